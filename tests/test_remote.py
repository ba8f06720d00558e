"""--rollout-url: a stand-in server on 127.0.0.1 with our own engine behind vLLM's wire format. A run through it is the local run;
a server that answers wrongly, late or not at all ends the run in one line. (Nobody has run remote.py against a real vLLM.)"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import EOS, ToyTask, tiny_model

import train_rl
from engines import server as remote
from infra.cli import UserError
from infra.runs import read_metrics
from infra.seeds import derive
from model import load_weights, save_model
from sample import generate

PROMPTS = [[1, 2, 10], [3, 4, 10], [5, 10], [1, 2, 10]]
ASK = dict(max_new_tokens=6, temperature=0.8, seed=7, stop_ids=[EOS], sequence_ids=[4, 5, 6, 7])
PATIENCE = dict(timeout=60.0, retries=0)


class Handler(BaseHTTPRequestHandler):
    """POST only. server.spoil(path, answer, handler) may change the answer, or answer itself and return None."""

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append((self.path, body))
        with server.lock:  # one model, one request after the other
            answer = self.complete(body) if self.path == "/v1/completions" else self.reload(body)
        answer = server.spoil(self.path, answer, self)
        if answer is not None:
            self.say(200, json.dumps(answer).encode())

    def complete(self, body):
        """vLLM's answer, by our engine. Its draws are a function of (seed, sequence id): the wire's seed is translated back."""
        seed, i = self.server.seeds[body["seed"]]
        out = generate(self.server.model, [body["prompt"]], max_new_tokens=body["max_tokens"], temperature=body["temperature"],
                       seed=seed, sequence_ids=[i], stop_ids=body["stop_token_ids"])
        ids, first = out.completion(0), len(body["prompt"])
        logprobs = dict(tokens=["?"] * len(ids), token_logprobs=out.logprob[0, first : first + len(ids)].tolist())
        return dict(choices=[dict(index=0, text="never read", logprobs=logprobs, finish_reason=out.finish_reason[0],
                                  token_ids=ids, prompt_token_ids=body["prompt"])])

    def reload(self, body):
        assert self.path == "/collective_rpc" and body["method"] == "reload_weights"
        if not self.server.stale:
            load_weights(self.server.model, body["kwargs"]["weights_path"])
        return dict(results=[None])

    def say(self, status, text, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text) if length is None else length))
        for k, v in headers.items():
            self.send_header(k, v)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.model, server.lock, server.seen, server.stale = tiny_model(), threading.Lock(), [], False
    server.spoil, server.over = (lambda path, answer, handler: answer), threading.Event()
    server.seeds = {derive(s, "sequence", i): (s, i) for s in (7, derive(0, "rl")) for i in range(100)}
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path, tokenizer, monkeypatch):
    """train() on the toy task -> final weights, metrics."""
    monkeypatch.setattr(train_rl, "get_task", lambda cfg: ToyTask())
    save_model(tmp_path / "policy", tiny_model(), tokenizer)

    def run(name, **options):
        small = dict(policy=str(tmp_path / "policy"), run_dir=str(tmp_path / name), device="cpu", num_prompts=2,
                     num_generations=4, steps=3, eval_steps=3, eval_problems=4, save_steps=3, reward="outcome",
                     rollout_args=["retries=0", "timeout=60"])
        train_rl.train(train_rl.Config(**(small | options)))
        return load_file(tmp_path / name / "step_000003" / "model.safetensors"), read_metrics(tmp_path / name)

    return run


def test_a_run_through_the_server_is_the_local_run_bit_for_bit(run, server, tmp_path):
    local, rows = run("local")
    far, far_rows = run("far", rollout_url=server.url + "/v1/", rollout_args=["retries=0", "model=policy"])
    initial = load_file(tmp_path / "policy" / "model.safetensors")
    assert any(not torch.equal(local[k], initial[k]) for k in local)
    assert all(torch.equal(local[k], far[k]) for k in local)
    clock = ("timing/", "step_time", "tokens_per_second", "sampling/")
    keep = [[{k: v for k, v in r.items() if not k.startswith(clock)} for r in x] for x in (rows, far_rows)]
    assert keep[0] == keep[1] and len(far_rows) == 4
    assert all(r["sampling/sampling_logp_difference/max"] < 1e-4 for r in far_rows[1:])
    paths = [path for path, _ in server.seen]
    assert [p for p in paths if p != "/v1/completions"] == ["/collective_rpc"] * 3 and len(paths) == 3 * 9
    folder = Path(server.seen[0][1]["kwargs"]["weights_path"])
    assert folder == tmp_path / "far" / "rollout_weights" and folder.is_absolute() and not list(tmp_path.glob("far/.tmp*"))
    asked = [body for path, body in server.seen if path == "/v1/completions"]
    assert len({b["seed"] for b in asked}) == 24 and len({b["cache_salt"] for b in asked}) == 3
    plain = dict(model="policy", top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
                 frequency_penalty=0.0, ignore_eos=True, min_tokens=0, n=1,
                 stop_token_ids=[EOS], temperature=1.0, return_token_ids=True)
    assert all(b[k] == v for b in asked for k, v in plain.items()) and all(0 <= b["seed"] < 2**63 for b in asked)


def test_rollouts_are_those_of_the_local_engine(server):
    want = generate(tiny_model(), PROMPTS, **ASK)
    got = remote.generate(server.url, "", PROMPTS, model=server.model, **ASK, **PATIENCE)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.length, want.length)
    assert torch.equal(got.prompt_len, want.prompt_len) and got.finish_reason == want.finish_reason
    assert set(want.finish_reason) == {"stop", "length"}  # both occur
    torch.testing.assert_close(got.logprob, want.logprob, rtol=0, atol=1e-5)  # another batch, another order of additions
    assert "model" not in server.seen[0][1] and "cache_salt" not in server.seen[0][1]


def test_an_eos_in_the_last_place_is_a_stop(server):
    """Versions of vLLM look at the length first; sample.py looks at the token."""
    assert remote.read_completion(fake([3, EOS], "length"), [1], 2, {EOS}, 12)[2] == "stop"
    assert remote.read_completion(fake([3, 4], "length"), [1], 2, {EOS}, 12)[2] == "length"


def fake(ids, reason, **changes):
    return dict(choices=[dict(token_ids=ids, prompt_token_ids=[1], finish_reason=reason,
                              logprobs=dict(token_logprobs=[-1.0] * len(ids))) | changes])


@pytest.mark.parametrize("answer, words", [
    ([], "no completion"), (dict(choices=[]), "no completion"), (dict(choices=[1]), "no completion"), (None, "no completion"),
    (fake([3], "stop", token_ids=None), "no token ids; it must know return_token_ids, as vLLM does from 0.10.2"),
    (fake([3, EOS], "stop", prompt_token_ids=None), "no token ids"),
    (fake([3, EOS], "stop", prompt_token_ids=[2]), "another prompt"),
    (fake([12, EOS], "stop"), "token id 12 is not in the policy's vocabulary of 12"), (fake([-1, EOS], "stop"), "token id -1"),
    (fake([True, EOS], "stop"), "token id True"), (fake(["\x1b[31m\n", EOS], "stop"), "token id [31m is not"),
    (fake([3, EOS], "stop", logprobs=None), "no log-prob"),
    (fake([3, EOS], "stop", logprobs=dict(token_logprobs=[-1.0])), "no log-prob"),
    (fake([3, EOS], "stop", logprobs=dict(token_logprobs=[float("nan"), -1.0])), "log-probs are none"),
    (fake([3, EOS], "stop", logprobs=dict(token_logprobs=[5.0, -1.0])), "processed_logprobs"),
    (fake([3, EOS], "stop", logprobs=dict(token_logprobs=[None, -1.0])), "log-probs are none"),
    (fake([3, 4], "stop"), "finish_reason 'stop' does not fit"),  # the stop token was cut off
    (fake([EOS, 3], "length"), "does not fit"), (fake([3], "length"), "'length' does not fit 1 of 2"),
    (fake([3, 3, EOS], "stop"), "does not fit 3 of 2"), (fake([], "stop"), "does not fit"), (fake([3, 4], "abort"), "'abort'"),
    (fake([3, 4], None), "does not fit"),
])
def test_what_an_answer_must_not_be(answer, words):
    with pytest.raises(UserError) as e:
        remote.read_completion(answer, [1], 2, {EOS}, 12)
    assert words in str(e.value) and str(e.value).isprintable()


def hang(path, answer, handler):
    handler.server.over.wait(10)


def dribble(path, answer, handler):
    handler.say(200, b" ", length=10**6)
    while not handler.server.over.wait(0.05):
        try:
            handler.wfile.write(b" ")
        except OSError:
            return


WRONG = {
    "no ids": (lambda p, a, h: dict(choices=[a["choices"][0] | dict(token_ids=None)]), "it returns no token ids"),
    "HTTP 500": (lambda p, a, h: h.say(500, b"out of\nmemory \x1b[2J"), "HTTP 500 out of memory [2J"),
    "HTTP 400": (lambda p, a, h: h.say(400, b'{"error": "max_model_len"}'), 'HTTP 400 {"error": "max_model_len"}'),
    "redirect": (lambda p, a, h: h.say(307, b"", Location="http://127.0.0.1:9/"), "HTTP 307"),
    "hang": (hang, "no answer within 0.3 s (--rollout-args timeout=)"),
    "dribble": (dribble, "no answer within 0.3 s (--rollout-args timeout=)"),
    "cut": (lambda p, a, h: h.say(200, json.dumps(a).encode()[:50], length=500), "connection lost: IncompleteRead"),
    "closed": (lambda p, a, h: h.connection.close(), "connection lost: "),
    "not JSON": (lambda p, a, h: h.say(200, b"<html>\n"), "its answer is not JSON: '<html>'"),
    "not UTF-8": (lambda p, a, h: h.say(200, b"\xff\xfe\xfa"), "its answer is not JSON"),
    "a number of 5000 digits": (lambda p, a, h: h.say(200, b"9" * 5000), "its answer is not JSON"),
    "too deep": (lambda p, a, h: h.say(200, b"[" * 200000), "its answer is not JSON"),
    "too long": (lambda p, a, h: h.say(200, b" " * 3000), "longer than 0 MiB"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_broken_server_is_one_line_in_bounded_time(server, name, monkeypatch):
    server.spoil, words = WRONG[name]
    if name == "too long":
        monkeypatch.setattr(remote, "MAX_BYTES", 2000)
    begin = time.time()
    with pytest.raises(UserError) as e:
        remote.generate(server.url, "", PROMPTS, model=server.model, **ASK, concurrency=2, timeout=0.3, retries=0)
    line = str(e.value)
    assert line.startswith(f"{server.url}: " if name == "no ids" else f"{server.url}/v1/completions: ") and words in line
    assert line.isprintable() and len(line) < 400 and time.time() - begin < 5  # two time-outs, on a slow machine


def test_a_lost_connection_and_http_5xx_are_tried_again(server, monkeypatch):
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    first = iter(["closed", "HTTP 500"])
    server.spoil = lambda p, a, h: WRONG[w][0](p, a, h) if (w := next(first, None)) else a
    want = generate(tiny_model(), PROMPTS, **ASK)
    got = remote.generate(server.url, "", PROMPTS, model=server.model, **ASK, concurrency=1, timeout=60.0, retries=2)
    assert torch.equal(got.tokens, want.tokens) and waits == [1, 2] and len(server.seen) == 6
    server.spoil = WRONG["HTTP 400"][0]  # a request that is wrong stays wrong
    with pytest.raises(UserError, match="HTTP 400"):
        remote.generate(server.url, "", PROMPTS[:1], model=server.model, **ASK | dict(sequence_ids=[0]), timeout=5.0, retries=2)
    assert len(server.seen) == 7


@pytest.mark.parametrize("status, header, wait", [
    (429, "7", 7), (408, None, 1), (503, "3", 3), (429, "0", 0), (429, "999999", 20), (429, "9" * 400, 20), (429, "-5", 1),
    (429, "soon", 1), (429, "Wed, 21 Oct 2015 07:28:00 GMT", 0), (429, "Wed, 21 Oct 2995 07:28:00 GMT", 20), (429, "nan", 1),
])
def test_a_server_that_is_busy_is_asked_again_when_it_says_so(server, monkeypatch, status, header, wait):
    """The wait that it asks for, no longer than a request may take (here 20 s); without one that can be read, 1 s."""
    waits, first = [], iter([status])
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    headers = {} if header is None else {"Retry-After": header}
    server.spoil = lambda p, a, h: h.say(code, b"busy", **headers) if (code := next(first, None)) else a
    got = remote.generate(server.url, "", PROMPTS, model=server.model, **ASK, concurrency=1, timeout=20.0, retries=1)
    assert torch.equal(got.tokens, generate(tiny_model(), PROMPTS, **ASK).tokens) and waits == [wait]
    server.spoil = lambda p, a, h: h.say(status, b'{"error": "slow down"}')
    with pytest.raises(UserError, match=f'HTTP {status} {{"error": "slow down"}}'):
        remote.generate(server.url, "", PROMPTS[:1], model=server.model, **ASK | dict(sequence_ids=[0]), timeout=20.0, retries=1)


@pytest.mark.parametrize("answer", [
    dict(error=dict(message="engine\nhas died", code=500)), dict(object="error", message="engine has died", code=40303),
    dict(error="engine has died", choices=[]), dict(detail="engine has died"), "engine has died", ["engine has died"],
    dict(choices=[dict(index=0, finish_reason="error", error=dict(message="engine has died"))]),
])
def test_what_a_server_says_is_wrong_is_handed_on(answer):
    with pytest.raises(UserError, match="engine.{1,2}has died") as e:
        remote.read_completion(answer, [1], 2, {EOS}, 12)
    assert str(e.value).isprintable() and len(str(e.value)) < 300


def test_nobody_there(server):
    with pytest.raises(UserError, match="http://127.0.0.1:1/v1/completions: connection lost: .*refused"):
        remote.generate("http://127.0.0.1:1", "", PROMPTS, model=server.model, **ASK, **PATIENCE)


def test_a_proxy_of_the_environment_is_passed_by(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    remote.generate(server.url, "", PROMPTS, model=server.model, **ASK, **PATIENCE)
    assert len(server.seen) == 4


def test_weights_that_were_not_loaded_end_the_run(run, server):
    """By a status, by the answer's own words, or, where it answers 200 with a clear conscience, by its log-probs."""
    server.spoil = lambda p, a, h: h.say(404, b'{"detail":"Not Found"}') if p == "/collective_rpc" else a
    with pytest.raises(UserError, match="collective_rpc: HTTP 404 .*the policy was not loaded .*VLLM_SERVER_DEV_MODE=1"):
        run("status", rollout_url=server.url)
    server.spoil = lambda p, a, h: dict(success=False, message="shape mismatch") if p == "/collective_rpc" else a
    with pytest.raises(UserError, match="the policy was not loaded: .*shape mismatch"):
        run("words", rollout_url=server.url)
    server.spoil = lambda p, a, h: dict(object="error", message="no such folder") if p == "/collective_rpc" else a
    with pytest.raises(UserError, match="the policy was not loaded: .*no such folder"):
        run("object", rollout_url=server.url)
    server.spoil, server.stale = lambda p, a, h: a, True
    with pytest.raises(UserError, match="step 2: .* differ from the trainer's by .* older weights"):
        run("stale", rollout_url=server.url, learning_rate=0.1)
    _, rows = run("blind", rollout_url=server.url, learning_rate=0.1, rollout_args=["tolerance=0"])
    assert rows[1]["sampling/sampling_logp_difference/mean"] < 1e-4 < 0.1 < rows[2]["sampling/sampling_logp_difference/mean"]


def test_log_probs_without_the_temperature_end_the_run(run, server, task, tokenizer):
    """vLLM's default (raw_logprobs): those of the distribution at temperature 1."""
    def raw(path, answer, handler):
        if path == "/v1/completions":
            choice = answer["choices"][0]
            with server.lock, torch.no_grad():
                tokens = torch.tensor([choice["prompt_token_ids"] + choice["token_ids"]])
                logp = server.model.logits(server.model(tokens))[0].log_softmax(-1)
            at = range(len(choice["prompt_token_ids"]), tokens.shape[1])
            choice["logprobs"]["token_logprobs"] = [float(logp[t - 1, tokens[0, t]]) for t in at]
        return answer

    server.spoil = raw
    run("one", rollout_url=server.url)  # at temperature 1 they are the same
    with pytest.raises(UserError, match="step 1: .*processed_logprobs"):
        run("cold", rollout_url=server.url, temperature=0.2)


@pytest.mark.parametrize("flags, words", [
    (dict(rollout_url="file:///etc/passwd"), "must be like http://HOST:8000"),
    (dict(rollout_url="localhost:8000"), "must be like"), (dict(rollout_url="http://"), "must be like"),
    (dict(rollout_url="http://[x"), "cannot be read"),
    (dict(rollout_url="http://h", rollout_args=["reload=reload"]), "reload 'reload' like /PATH"),
    (dict(rollout_url="http://h", rollout_args=["reload_body={"]), "cannot be read"),
    (dict(rollout_url="http://h", rollout_args=["timeout=0"]), "timeout above 0"),
])
def test_flags_that_cannot_be(run, flags, words):
    with pytest.raises(UserError, match=words):
        run("flags", **flags)


def test_a_server_serves_one_arm():
    with pytest.raises(UserError, match="--rollout-url run one arm"):
        train_rl.main(["--reward", "pav", "--rollout-url", "http://h"])
