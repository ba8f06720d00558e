"""Token by token, and in a conversation: the same tokens as generate(); Ctrl-C ends an answer and nothing else."""

import os
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from toy import EOS, tiny_model

import sample
from engines.stream import converse, decoded, fitting_prompt, stream
from infra.cli import UserError
from model import save_model
from open_weights.tokenizer import alphabet_tokenizer
from report import chat
from sample import generate
from tasks.base import Task
from verifier import Verifier, save_verifier, step_values

ROOT = Path(__file__).parent.parent
OPTIONS = dict(max_new_tokens=20, temperature=1.0, seed=5, stop_ids=[EOS])


@pytest.mark.parametrize("more", [{}, dict(temperature=0.0), dict(top_k=3), dict(top_p=0.7, min_p=0.05)])
def test_the_stream_is_what_generate_draws(model, more):
    options = OPTIONS | more
    for i, prompt in enumerate(([3], [1, 2, 10], [5, 5, 5, 5, 5, 5])):
        out = generate(model, [prompt], sequence_ids=[i], **options)
        assert list(stream(model, prompt, sequence_id=i, **options)) == out.completion(0)


def test_it_ends_with_the_context_and_refuses_what_generate_refuses(model):
    options = OPTIONS | dict(max_new_tokens=100, stop_ids=[])
    assert len(list(stream(model, [1] * 30, **options))) == model.cfg.max_position_embeddings - 30
    with pytest.raises(UserError, match="has 32 tokens"):
        list(stream(model, [1] * 32, **options))


def test_characters_of_several_tokens_and_control_characters():
    class Bytes:
        def token_bytes(self, t):
            return bytes([t])

    text = "caf\u00e9\n\x1b[2J"
    pieces = [piece for _, piece in decoded(text.encode(), Bytes())]
    assert "".join(pieces) == "caf\u00e9\n\ufffd[2J" and pieces[3:5] == ["", "\u00e9"]
    assert "".join(p for _, p in decoded("\u00e9".encode()[:1], Bytes())) == "\ufffd"


# ----------------------------------------------------------------------------------------------------
# The conversation.


def chat_tokenizer():
    """ChatML's markers, and the letters that its headers need."""
    tokenizer = alphabet_tokenizer(sorted(set("abcdefghijklmnopqrstuvwxyz\n ")), eos="<|im_end|>", bos="<|im_start|>")
    tokenizer.chat_format = "chatml"
    return tokenizer


def lines(*typed):
    return iter([*typed, ""]).__next__


def test_the_history_is_written_in_the_models_chat_format(capsys):
    tokenizer = chat_tokenizer()
    model = tiny_model(vocab=tokenizer.n_vocab, context=200)
    options = dict(max_new_tokens=6, temperature=1.0, seed=1, stop_ids=tokenizer.eos_ids)
    history = converse(model, tokenizer, options | dict(slots=64), read=lines("hello", "more"))
    first = tokenizer.chat([dict(role="user", content="hello")])
    want = generate(model, [first], **options)
    assert history[0] == ("hello", want.completion(0))
    answer = tokenizer.decode(want.completion(0))
    second = tokenizer.chat([dict(role="user", content="hello"), dict(role="assistant", content=answer),
                             dict(role="user", content="more")])
    assert history[1] == ("more", generate(model, [second], sequence_ids=[1], **options).completion(0))
    out = capsys.readouterr().out
    assert answer in out and "chatml" in out


def test_without_a_chat_format_the_text_goes_on(tokenizer, capsys):
    model = tiny_model(context=200)
    options = OPTIONS | dict(max_new_tokens=4)
    history = converse(model, tokenizer, options, read=lines("12=", "x", "3"))
    (_, first), (said, second) = history
    assert said == "3"  # a character that the alphabet lacks is an error, not the end
    prompt = tokenizer.encode("12=") + [t for t in first if t != EOS] + tokenizer.encode("3")
    assert second == generate(model, [prompt], sequence_ids=[1], **options).completion(0)
    out = capsys.readouterr().out
    assert "error: 'x'" in out and ("cut off at 4 tokens" in out) == any(a[-1] != EOS for _, a in history)


def test_the_oldest_turns_are_forgotten_where_the_context_ends(tokenizer):
    history = [("1" * 8, [2] * 8), ("3" * 4, [4] * 4)]
    ids, dropped = fitting_prompt(history, "55", tokenizer, True, context=20, max_new_tokens=50)
    assert dropped == 1 and ids == [3] * 4 + [4] * 4 + [5, 5] and len(history) == 1
    with pytest.raises(UserError, match="type less"):
        fitting_prompt([], "1" * 11, tokenizer, True, context=20, max_new_tokens=50)


def test_flags_that_mean_nothing_in_a_conversation():
    with pytest.raises(UserError, match=r"python -m report\.chat"):
        sample.main(["--verifier", "v"])
    with pytest.raises(UserError, match=r"python -m report\.show"):
        sample.main(["--verifier", "v", "--prompt", "hi"])
    with pytest.raises(UserError, match="--n is of"):
        sample.main(["--n", "3"])
    with pytest.raises(UserError, match="--verifier is missing"):
        chat.main([])


class Terminal:
    """A script in a pseudo-terminal, as somebody sits before it."""

    def __init__(self, *argv, cwd):
        pty = pytest.importorskip("pty")
        self.pid, self.file = pty.fork()
        if not self.pid:
            os.chdir(cwd)
            os.execve(sys.executable, [sys.executable, *map(str, argv)], os.environ | dict(OMP_NUM_THREADS="1", TERM="dumb"))
        self.text = ""

    def until(self, pattern, seconds=120):
        """Read until the regular expression stands in what has come since the last call."""
        end = time.time() + seconds
        while not re.search(pattern, self.text):
            ready, _, _ = select.select([self.file], [], [], 1.0)
            assert time.time() < end, self.text
            try:
                self.text += os.read(self.file, 4096).decode("utf-8", "replace") if ready else ""
            except OSError:  # the other end is closed
                raise AssertionError(f"ended before {pattern!r}: {self.text}") from None
        seen, self.text = self.text, ""
        return seen

    def type(self, text):
        os.write(self.file, text.encode())

    def exit_code(self):
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.file)
        return code


@pytest.fixture
def talker(tmp_path):
    """A model that never stops by itself, and a verifier for it."""
    tokenizer = alphabet_tokenizer(list("0123456789\n"), eos=None)
    model = tiny_model(vocab=tokenizer.n_vocab, context=50_000)
    save_model(tmp_path / "policy", model, tokenizer)
    verifier = Verifier(tiny_model(seed=1, vocab=tokenizer.n_vocab, context=50_000), fingerprint=tokenizer.fingerprint)
    torch.nn.init.normal_(verifier.head.weight, generator=torch.Generator().manual_seed(0))
    (tmp_path / "verifier").mkdir()
    save_verifier(tmp_path / "verifier", verifier, tokenizer, {})
    return tmp_path, model, tokenizer, verifier


def test_ctrl_c_ends_the_answer_and_ctrl_d_the_program(talker):
    folder, *_ = talker
    t = Terminal(ROOT / "sample.py", "--model", "policy", "--temperature", "1", "--max-new-tokens", "30000", "--device", "cpu",
                 cwd=folder)
    t.until("> $")
    t.type("12\r")
    t.until(r"12\r\n[\d\r\n]{20}")  # it streams: these came before the end
    t.type("\x03")
    t.until(r" \[stopped\]\r\n> $")
    t.type("3\r")
    t.until(r"3\r\n[\d\r\n]{20}")
    t.type("\x03")
    t.until(r"stopped\]\r\n> $")
    t.type("\x04")
    assert t.exit_code() == 0


def test_kill_ends_the_program_in_an_answer_too(talker):
    folder, *_ = talker
    t = Terminal(ROOT / "sample.py", "--model", "policy", "--temperature", "1", "--max-new-tokens", "30000", "--device", "cpu",
                 cwd=folder)
    t.until("> $")
    t.type("1\r")
    t.until(r"1\r\n[\d\r\n]{20}")
    os.kill(t.pid, signal.SIGTERM)
    assert t.exit_code() == -signal.SIGTERM


def test_each_line_carries_its_value_and_progress(talker, capsys, monkeypatch):
    folder, model, tokenizer, verifier = talker
    typed = iter(["12", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    chat.main(["--model", str(folder / "policy"), "--verifier", str(folder / "verifier"), "--temperature", "1",
               "--max-new-tokens", "150", "--device", "cpu"])
    out = capsys.readouterr().out
    prompt = tokenizer.encode("12")
    answer = generate(model, [prompt], max_new_tokens=150, temperature=1.0, seed=0, stop_ids=tokenizer.eos_ids).completion(0)
    length = len(prompt) + len(answer)
    ends = [len(prompt), *Task().step_ends(prompt + answer, len(prompt), length, tokenizer)]
    values = step_values(verifier, torch.tensor([prompt + answer]), torch.tensor([ends]))[0].tolist()
    shown = re.findall(r"\[A ([+-]\d\.\d\d)  V (\d\.\d\d)\]", out)
    assert len(shown) == len(ends) - 1 > 1 and f"V {values[0]:.2f} (prompt alone)" in out
    for (a, v), before, after in zip(shown, values, values[1:]):
        assert float(v) == pytest.approx(after, abs=0.006) and float(a) == pytest.approx(after - before, abs=0.006)
    assert "\x1b" not in out  # no terminal, no colour
    plain = re.sub(r"  \[A .*?\]", "", out.split("(prompt alone)\n")[1])
    assert plain.replace("\n", "").startswith(tokenizer.decode(answer).replace("\n", ""))
