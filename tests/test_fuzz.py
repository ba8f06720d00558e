"""Hostile input, made by the thousand: graders, files of weights, tokenizers, problems and settings answer with a verdict or
with one line that a person can mend, never with a traceback, a hang, or memory by the gigabyte."""

import json
import struct
import time

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from toy import tiny_model  # noqa: E402

from engines import server  # noqa: E402
from infra.cli import UserError  # noqa: E402
from model import load_model, save_model  # noqa: E402
from open_weights import chat  # noqa: E402
from open_weights.families import Config  # noqa: E402
from open_weights.load import load_tokenizer  # noqa: E402
from open_weights.tokenizer import alphabet_tokenizer  # noqa: E402
from report.statistics import vote  # noqa: E402
from tasks import get_task  # noqa: E402
from tasks.answers import answers_equal, canonical, extract_answer, parse_number  # noqa: E402
from tasks.files import last_number, read_rows  # noqa: E402

LIMIT = 1.0  # seconds of processor time for one verdict
few = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
many = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# Text as models write it: LaTeX, brackets, numbers, and whatever else.
pieces = st.sampled_from([
    "\\boxed{", "\\frac{", "}{", "}", "{", "\\sqrt[", "]{", "^{", "_{", "\\left(", "\\right]", "(", ")", "[", "]", ",", ";",
    "\\cup", "####", "#### ", "\\text{", "\\%", "%", "$", "^", "*", "**", "/", "-", "+", "=", ".", "0", "1", "9", "99999999999",
    "1e9", "e308", "\\pi", "x", "!", "\\cdot", "\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "&", "\n", " ", "The answer is ",
    "\u0663", "\u00b2", "\x00", "9**9**9**9", "__import__('os').system('x')", "\\infty", "inf", "nan", "\\input{/etc/passwd}",
    "\u202e", "\U0001f600", "i", "^\\circ", "<think>", "</think>", " and ", ", ", "; ", "x=", "f(", "\\in ", "\\{", "\\}",
    "\u00bd", "\u207b\u00b9", "\u03c0", "\u221a", "\\mathrm{", "\\color{red}", "\\,", "\\quad", "{,}",
    "000", " tenths", " km/h", "apples ", "\\ln", "\\sin^", "\\log_", "\\begin{array}{c}", "\\end{array}", "\\right.",
    "\\le", "sqrt(", "10^-4", "e^"])
latex = st.lists(pieces, max_size=60).map("".join) | st.text(max_size=200)
deep = st.tuples(st.sampled_from(
    ["(", "{", "\\frac{", "\\sqrt{", "[", "\\boxed{", "^{", "-", "2^", "x=", "x\\in ", "\\sin", "\\frac", "\\sqrt", "^", "1 ",
     "a", "abe ", "3 cm ", "1,", "\\{", "\\text{", "1000 ", "\\begin{pmatrix}",
     "(\\begin{array}"]), st.integers(1, 3000)).map(
    lambda x: x[0] * x[1])


def timed(call, *args):
    start = time.process_time()
    result = call(*args)
    assert time.process_time() - start < LIMIT, (call, args)
    return result


@many
@given(latex | deep, latex | deep)
@example("9^{9^{9^{9}}}", "9**9**9")
@example("(" * 100_000, ")" * 100_000)
@example("\\boxed{" * 20_000, "1")
def test_the_grader_answers_in_time(a, b):
    found = timed(extract_answer, a)
    assert found is None or isinstance(found, str)
    assert timed(answers_equal, a, b) in (True, False)
    assert timed(answers_equal, found, b) in (True, False)
    assert not answers_equal(None, a) and not answers_equal(a, None)
    timed(last_number, a)
    timed(canonical, a[:2000])
    timed(parse_number, a[:2000])


@many
@given(latex)
def test_an_answer_equals_itself_or_is_refused_both_ways(a):
    """Reflexive where it is read at all, symmetric always: a reward must not depend on which side is called gold."""
    if answers_equal(a, a):
        assert canonical(a)
    b = a + " "
    assert answers_equal(a, b) == answers_equal(b, a)


@many
@given(st.lists(st.sampled_from(["1", "2", None, "x"]) | st.none(), min_size=1, max_size=9))
def test_the_vote_names_one_of_the_votes(answers):
    winner = vote(answers)
    assert (winner is None) == all(a is None for a in answers)
    assert winner is None or answers[winner] is not None


@pytest.fixture(scope="module")
def tasks():
    return [(get_task(name), 1.0) for name in ("planted", "countdown", "chain", "stargraph", "worded", "probe", "contextual")]


@few
@given(st.text(max_size=120) | st.text("0123456789+-*/= \n|><abcdefg!?.", max_size=120))
def test_every_task_grades_any_text(tasks, text):
    for task, _ in tasks:
        problem = task.problems("train", 1, 0)[0]
        assert timed(task.grade, problem, text) in (0.0, 1.0)
        step = timed(task.first_illegal_step, problem, text)
        assert step is None or step >= 0
        value = task.exact_value(problem, text, 1.0)
        assert value is None or 0 <= value <= 1


# ----------------------------------------------------------------------------------------------------
# Files. One valid file, damaged in every way that bytes can be.


damage = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=0, max_size=9), st.integers(0, 12)), min_size=1, max_size=4)


def damaged(data, edits):
    """Replace stretches of bytes: (place as a share of the length, what stands there then, how many bytes go)."""
    for place, new, drop in edits:
        at = int(place * len(data))
        data = data[:at] + new + data[at + drop :]
    return data


def one_line(call, *args):
    """-> the result, or None where it was refused in one line. Anything else is a bug."""
    start = time.process_time()
    try:
        return call(*args)
    except UserError as e:
        assert str(e) and "\n" not in str(e)
        return None
    finally:
        assert time.process_time() - start < 3 * LIMIT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = alphabet_tokenizer(list("0123456789="))
    folder = tmp_path_factory.mktemp("fuzz") / "m"
    save_model(folder, tiny_model(vocab=tokenizer.n_vocab), tokenizer)
    return folder


def with_file(folder, name, data, call):
    path, old = folder / name, (folder / name).read_bytes()
    path.write_bytes(data)
    try:
        return one_line(call, folder)
    finally:
        path.write_bytes(old)


@few
@given(damage)
def test_damaged_weights(folder, edits):
    data = damaged((folder / "model.safetensors").read_bytes(), edits)
    with_file(folder, "model.safetensors", data, load_model)


@few
@given(st.integers(0, 2**64 - 1), st.binary(max_size=40))
@example(2**63, b"{}")
@example(8, b'{"a":{}}')
def test_a_header_that_lies_about_its_length(folder, length, rest):
    with_file(folder, "model.safetensors", struct.pack("<Q", length) + rest, load_model)


@few
@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=4))
def test_a_tensor_that_claims_to_be_huge_costs_no_memory(folder, shape):
    header = json.dumps({"model.norm.weight": dict(dtype="F32", shape=shape, data_offsets=[0, 4])}).encode()
    assert with_file(folder, "model.safetensors", struct.pack("<Q", len(header)) + header + b"\0" * 4, load_model) is None


json_values = st.recursive(st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
                           lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3), max_leaves=8)


@few
@given(st.data())
def test_config_fields_of_any_kind(folder, data):
    config = json.loads((folder / "config.json").read_text())
    field = data.draw(st.sampled_from([*config, "rope_scaling", "head_dim", "surprise"]))
    config[field] = data.draw(json_values)
    cfg = with_file(folder, "config.json", json.dumps(config).encode(), lambda f: Config.from_json(f / "config.json"))
    assert cfg is None or (cfg.hidden_size >= 1 and cfg.num_attention_heads >= 1)


@few
@given(st.data())
def test_tokenizer_files_of_any_kind(folder, data):
    tree = json.loads((folder / "tokenizer.json").read_text())
    at = tree
    while isinstance(at, (dict, list)) and at:  # a random leaf or branch is replaced
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(at[key], (dict, list)) or data.draw(st.booleans()):
            at[key] = data.draw(json_values)
            break
        at = at[key]
    found = with_file(folder, "tokenizer.json", json.dumps(tree).encode(), load_tokenizer)
    if found is not None:
        assert all(0 <= t < found.n_vocab for t in found.encode("12=3"))


@few
@given(damage)
def test_damaged_tokenizer_bytes(folder, edits):
    with_file(folder, "tokenizer.json", damaged((folder / "tokenizer.json").read_bytes(), edits), load_tokenizer)


@few
@given(st.lists(json_values | st.fixed_dictionaries(dict(question=json_values, answer=json_values)), max_size=4), damage,
       st.booleans())
def test_problem_files_of_any_kind(tmp_path_factory, rows, edits, damage_it):
    path = tmp_path_factory.mktemp("rows") / "q.jsonl"
    data = "".join(json.dumps(r) + "\n" for r in rows).encode()
    path.write_bytes(damaged(data, edits) if damage_it else data)
    found = one_line(read_rows, path)
    assert found is None or all(isinstance(row, dict) for _, row in found)
    one_line(lambda: get_task("jsonl", data=[str(path)]).problems("train", 2))


# ----------------------------------------------------------------------------------------------------
# Templates, and what a server answers


jinja = st.lists(st.sampled_from([
    "{%", "%}", "{%-", "-%}", "{{", "}}", "{#", "#}", "'", '"', "\\", "\\n", "\n", " ", "if ", "endif",
    "else", "for m in messages ", "endfor", "add_generation_prompt", "<|im_start|>",
    "<|im_start|>assistant\\n", "<think>\\n", "</think>", "<start_of_turn>model\n", "You are ", "messages",
    "+", "~", "set x = ", "<\uff5cUser\uff5c>", "\ud800",
]) | st.text(max_size=6), max_size=60).map("".join)


@many
@given(jinja, st.integers(1, 3000))
@example("<|im_start|>{% if add_generation_prompt %}{#", 3000)
@example("<|im_start|>" + " " * 100_000 + "{%", 1)
@example("<|im_start|>{{'", 3000)
def test_any_template_is_recognised_or_not_in_time(text, times):
    for template in (text, text * times if len(text) < 60 else text):
        name = timed(chat.detect, template)
        assert name is None or name in chat.FORMATS


@few
@given(json_values | st.fixed_dictionaries(dict(choices=st.lists(json_values | st.fixed_dictionaries(dict(
    token_ids=json_values, prompt_token_ids=st.just([1]), finish_reason=json_values, logprobs=json_values,
    error=json_values)), max_size=2))), st.text(max_size=40))
def test_answers_of_a_server_of_any_kind(answer, header):
    with pytest.raises(UserError) as e:
        server.read_completion(answer, [1], 2, {11}, 12)
    assert str(e.value).isprintable()
    wait = server.retry_after({"Retry-After": header}, 0.0)
    assert wait is None or wait >= 0


@few
@given(st.sampled_from(["tokenizer_config", "special_tokens_map", "generation_config", "config"]), st.dictionaries(
    st.sampled_from(["bos_token", "eos_token", "eos_token_id", "eos_token_ids", "chat_template", "chat_format", "add_bos_token"]),
    json_values, max_size=4))
def test_files_beside_a_tokenizer_of_any_kind(tmp_path_factory, folder, name, content):
    beside = tmp_path_factory.mktemp("beside")
    (beside / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (beside / f"{name}.json").write_text(json.dumps(content))
    found = one_line(load_tokenizer, beside)
    assert found is None or all(0 <= i < found.n_vocab for i in found.eos_ids)


@few
@given(damage)
def test_damaged_gguf(tmp_path_factory, edits):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    from open_weights.gguf import read_gguf

    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(folder / "good.gguf", "llama")
    writer.add_context_length(8)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "bad.gguf").write_bytes(damaged((folder / "good.gguf").read_bytes(), edits))
    one_line(read_gguf, folder / "bad.gguf")


def test_no_pickle_is_read(folder, tmp_path):
    """A checkpoint in torch's own format would run code when it is read: such folders are refused, whatever is in them."""
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert one_line(load_model, tmp_path) is None
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert one_line(load_model, tmp_path) is None
