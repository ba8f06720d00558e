"""Completions for train_rl.py from a server that speaks token ids and log-probs (vLLM).

    # where there are GPUs, vLLM's OpenAI-compatible server:
    VLLM_SERVER_DEV_MODE=1 vllm serve DIR --logprobs-mode processed_logprobs --port 8000
    python train_rl.py --reward pav --policy DIR --verifier DIR --run-dir runs/big \\
        --rollout-url http://HOST:8000

Before each batch rank 0 writes the policy to RUN_DIR/rollout_weights (a transformers folder; the
server must see it by the same path) and posts reload_body to reload. Then each sequence is one POST
to /v1/completions with a seed to itself: token ids in, token ids and log-probs out; text is never
read. Evaluations stay with sample.py.

A server that answers 200 may still hold old weights. So the mean difference of its log-probs to the
trainer's ends the run above tolerance (nats). A step at a small learning rate moves less than
bfloat16 rounds: what is seen is a server that stays behind, not one that is a step late. What of
vLLM this relies on, and since which version: docs/scale.md.

Left out: an importance weight for a stale sampler, API keys, streaming, several servers. Requests
go to the given URL alone, past proxies and without following redirects.
"""

import http.client
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import torch

from engines.batch import begin_batch
from infra import parallel
from infra.cli import UserError, key_values, opt
from infra.seeds import derive
from open_weights.files import save_model

MAX_BYTES = 1 << 26  # of one answer: room for 100,000 tokens and their names many times over
MAX_WAIT = 60.0  # seconds before a request is sent again, and never more than it may take itself


@dataclass
class RolloutFlags:
    rollout_url: str = opt(
        "", "let this server complete the prompts, e.g. http://HOST:8000 (vLLM: engines/server.py)",
        "rollout server")
    rollout_args: list = opt(
        [], "KEY=VALUE ...: model, reload, reload_body, concurrency, timeout, retries, tolerance "
        "(engines/server.py)", "rollout server")


ARGS = dict(
    model="",  # the name that the server has for the policy (empty: whatever it serves)
    reload="/collective_rpc",  # path on the server that loads new weights
    # JSON to post there; FOLDER becomes the path of RUN_DIR/rollout_weights
    reload_body='{"method": "reload_weights", "kwargs": {"weights_path": "FOLDER"}}',
    concurrency=256,  # requests under way at once, of each process
    timeout=600.0,  # seconds that one request, or a reload, may take
    retries=2,  # times a request is sent again after a lost connection, HTTP 408, 429 or 5xx
    # mean |log-prob of the server - of the trainer| in nats that ends the run (0: never)
    tolerance=0.1,
)


class _AsIs(urllib.request.HTTPErrorProcessor):
    def http_response(self, request, response):  # whatever the status: no redirect is followed
        return response

    https_response = http_response


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _AsIs)


def one_line(text, limit=200):
    """Untrusted text or bytes -> one printable line."""
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:limit]


def in_words(answer):
    """An answer of any shape -> one line. What a server says is wrong stands in "error", "message"
    or "detail"; all of it is shown."""
    return one_line(json.dumps(answer, ensure_ascii=False))


def fetch(url, body, timeout):
    """POST body as JSON -> (status, headers, bytes). OSError (TimeoutError, URLError),
    HTTPException, UserError."""
    header = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), header)
    end = time.monotonic() + timeout
    parts = []
    with OPENER.open(request, timeout=timeout) as answer:
        while part := answer.read1(1 << 16):
            parts.append(part)
            if sum(map(len, parts)) > MAX_BYTES:
                raise UserError(f"{url}: its answer is longer than {MAX_BYTES >> 20} MiB")
            if time.monotonic() > end:  # the socket's own time-out starts anew with every byte
                raise TimeoutError
        if answer.length:  # read1() takes a connection that is cut off for the end
            raise http.client.IncompleteRead(b"", answer.length)
    return answer.status, answer.headers, b"".join(parts)


def retry_after(headers, now):
    """The header Retry-After, seconds or a date (RFC 9110, 10.2.3) -> seconds from now on (now:
    time.time()); None without one that can be read."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - now, 0.0)
    except (TypeError, ValueError, OverflowError):
        return None


def post(url, body, timeout, retries=0, hint=""):
    """POST body as JSON -> parsed JSON (None: an empty answer).

    Lost connections, HTTP 408 (request time-out), 429 (too many requests) and 5xx are tried again,
    after as many seconds as the server asks for (retry_after), else after 1, 2, 4..., but after at
    most MAX_WAIT. A time-out is not: the next try would take as long. UserError, one line: whatever
    remains.
    """
    for attempt in range(retries + 1):
        wait = None  # seconds that the server asks for
        try:
            status, headers, text = fetch(url, body, timeout)
            if status == 200:
                return json.loads(text) if text.strip() else None
            problem = f"HTTP {status} {one_line(text)}".strip()
            again = status in (408, 429) or status >= 500
            wait = retry_after(headers, time.time())
        except (OSError, http.client.HTTPException) as e:
            again = not isinstance(getattr(e, "reason", e), TimeoutError)
            problem = f"connection lost: {one_line(e)}"
            if not again:
                problem = f"no answer within {timeout:g} s (--rollout-args timeout=)"
        except UserError:
            raise
        except (ValueError, RecursionError):
            problem = f"its answer is not JSON: {one_line(text, 80)!r}"
            again = False
        if not again or attempt == retries:
            raise UserError(f"{url}: {problem}{hint}")
        time.sleep(min(2**attempt if wait is None else wait, timeout, MAX_WAIT))


def read_completion(answer, prompt, budget, stops, vocab):
    """A server's answer to one prompt -> (token ids, log-probs, "stop" or "length"). UserError:
    what is wrong with it."""
    try:
        (choice,) = answer["choices"]
        ids = choice.get("token_ids")
        asked = choice.get("prompt_token_ids")
        reason = choice.get("finish_reason")
        logprobs = choice.get("logprobs")
    except (TypeError, KeyError, ValueError, AttributeError):
        raise UserError(f"its answer holds no completion: {in_words(answer)}") from None
    if choice.get("error"):
        raise UserError(f"its answer is an error: {in_words(choice['error'])}")
    if not isinstance(ids, list) or not isinstance(asked, list):
        raise UserError("it returns no token ids; it must know return_token_ids, as vLLM does from "
                        "0.10.2 on")
    if asked != prompt:
        raise UserError("it completed another prompt than the one sent (prompt_token_ids differ)")
    if bad := [i for i in ids if type(i) is not int or not 0 <= i < vocab]:
        raise UserError(f"token id {one_line(bad[0], 30)} is not in the policy's vocabulary of "
                        f"{vocab}: another model?")
    logprobs = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(logprobs, list) or len(logprobs) != len(ids):
        raise UserError("it returns no log-prob for each token (logprobs.token_logprobs)")
    if not all(type(x) in (int, float) and -1e6 < x < 0.01 for x in logprobs):  # NaN fails too
        raise UserError(
            "its log-probs are none; start vLLM with --logprobs-mode processed_logprobs")
    stopped = bool(ids) and ids[-1] in stops
    whole = stopped if reason == "stop" else reason == "length" and len(ids) == budget
    if not whole or len(ids) > budget or any(i in stops for i in ids[:-1]):
        ends = "end" if stopped else "do not end"
        raise UserError(f"finish_reason {one_line(reason, 20)!r} does not fit {len(ids)} of "
                        f"{budget} tokens that {ends} with a stop token")
    return ids, logprobs, "stop" if stopped else "length"


def generate(url, model_name, prompts, *, model, max_new_tokens, temperature, seed, stop_ids,
             sequence_ids=None, salt="", concurrency=256, timeout=600.0, retries=2):
    """Complete every prompt once, on a server -> Rollouts; arguments and result are those of
    sample.decode_all().

    model: its config says context and vocabulary; the weights are the server's. model_name: "" for
    the one it serves. salt: new with each version of the policy, so that no KV of an older one is
    used. UserError: the first request that fails.
    """
    begin = time.time()
    stops = {int(i) for i in stop_ids}
    out, limit, ids, _, _ = begin_batch(model, prompts, max_new_tokens, sequence_ids, stop_ids)
    budget = (limit - out.prompt_len).tolist()

    def ask(b):  # all is set that a server's generation_config could cut or bend the draws with
        body = dict(prompt=prompts[b], max_tokens=budget[b], temperature=temperature, n=1,
                    top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
                    frequency_penalty=0.0, min_tokens=0, ignore_eos=True,
                    stop_token_ids=sorted(stops), seed=derive(seed, "sequence", int(ids[b])),
                    logprobs=1, return_token_ids=True)
        body |= {k: v for k, v in dict(model=model_name, cache_salt=salt).items() if v}
        answer = post(f"{url}/v1/completions", body, timeout, retries)
        try:
            return read_completion(answer, prompts[b], budget[b], stops, model.cfg.vocab_size)
        except UserError as e:
            raise UserError(f"{url}: {e}") from None

    pool = ThreadPoolExecutor(concurrency)
    try:
        waiting = {pool.submit(ask, b): b for b in range(len(prompts))}
        for future in as_completed(waiting):
            b = waiting[future]
            new, logprob, reason = future.result()
            first = len(prompts[b])
            last = first + len(new)
            out.tokens[b, first:last] = torch.tensor(new)
            out.logprob[b, first:last] = torch.tensor(logprob)
            out.length[b] = last
            out.finish_reason[b] = reason
    finally:  # after an error: requests under way end by their time-out
        pool.shutdown(wait=False, cancel_futures=True)
    used = int(out.length.max()) if prompts else 1
    out.tokens = out.tokens[:, :used].clone()
    out.logprob = out.logprob[:, :used].clone()
    out.seconds = time.time() - begin
    return out


def connect(cfg, tokenizer):
    """--rollout-url -> an engine for sample.generate() that hands the policy over first (None
    without it). Collective under torchrun: rank 0 writes and asks for the reload, then each process
    asks for its share. UserError: flags that cannot be."""
    if not cfg.rollout_url:
        return None
    args = key_values(cfg.rollout_args, ARGS, "--rollout-args")
    url = cfg.rollout_url.rstrip("/").removesuffix("/v1")
    folder = Path(cfg.run_dir).resolve() / "rollout_weights"
    try:
        parts = urlsplit(url)
        body = json.loads(args["reload_body"].replace("FOLDER", json.dumps(str(folder))[1:-1]))
    except ValueError as e:
        raise UserError(
            f"--rollout-url or --rollout-args reload_body cannot be read: {e}") from None
    reads = parts.scheme in ("http", "https") and parts.hostname and not parts.query
    if not reads or not args["reload"].startswith("/"):
        raise UserError(f"--rollout-url {url!r} must be like http://HOST:8000, reload "
                        f"{args['reload']!r} like /PATH")
    if args["concurrency"] < 1 or args["timeout"] <= 0 or args["retries"] < 0:
        raise UserError(
            "--rollout-args: concurrency is at least 1, timeout above 0, retries at least 0")
    patience = dict(timeout=args["timeout"], retries=args["retries"])

    def hand_over(model):
        save_model(folder, model, tokenizer)
        hint = "; the policy was not loaded (vLLM needs VLLM_SERVER_DEV_MODE=1)"
        answer = post(url + args["reload"], body, **patience, hint=hint)
        refused = isinstance(answer, dict) and (
            answer.get("success") is False or answer.get("error")
            or answer.get("object") == "error")
        if refused:
            raise UserError(
                f"{url + args['reload']}: the policy was not loaded: {in_words(answer)}")

    def engine(model, prompts, **options):
        if parallel.rank() == 0:
            hand_over(model)
        parallel.barrier()
        return generate(url, args["model"], prompts, model=model, salt=str(time.time_ns()),
                        concurrency=args["concurrency"], **patience, **options)

    return engine


def require_agreement(cfg, step, difference):
    """Stop where the server drew from another distribution. difference: mean |its log-probs - the
    trainer's|, in nats."""
    if not cfg.rollout_url:
        return
    tolerance = key_values(cfg.rollout_args, ARGS, "--rollout-args")["tolerance"]
    if tolerance and not difference <= tolerance:
        raise UserError(f"step {step}: the log-probs of {cfg.rollout_url} differ from the "
                        f"trainer's by {difference:.3g} in the mean: it has other or older "
                        "weights, or leaves the temperature out (vLLM needs --logprobs-mode "
                        "processed_logprobs); "
                        "--rollout-args tolerance= is the limit, the last checkpoint is intact")
