"""Completions for train_rl.py from a server that speaks token ids and log-probs (vLLM's OpenAI-compatible one).

    VLLM_SERVER_DEV_MODE=1 vllm serve DIR --logprobs-mode processed_logprobs --port 8000          # where there are GPUs
    python train_rl.py --reward pav --policy DIR --verifier DIR --run-dir runs/big --rollout-url http://HOST:8000

Before each batch rank 0 writes the policy to RUN_DIR/rollout_weights (a transformers folder; the server must see it by the same
path) and posts reload_body to reload. Then each sequence is one POST to /v1/completions with a seed of its
own: token ids in, token ids and log-probs out; text is never read. Evaluations stay with sample.py.

A server that answers 200 may still hold old weights. So the mean difference of its log-probs to the trainer's ends the run above
tolerance (nats). A step at a small learning rate moves less than bfloat16 rounds: what is seen is a server that stays
behind, not one that is a step late. What of vLLM this relies on, and since which version: docs/scale.md.

Left out: an importance weight for a stale sampler, API keys, streaming, several servers. Requests go to the given URL alone, past
proxies and without following redirects.
"""

import http.client
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch

from engines.batch import begin_batch
from infra import parallel
from infra.cli import UserError, key_values, opt
from infra.seeds import derive
from open_weights.files import save_model

MAX_BYTES = 1 << 26  # of one answer: room for 100,000 tokens and their names many times over

@dataclass
class RolloutFlags:
    rollout_url: str = opt("", "let this server complete the prompts, e.g. http://HOST:8000 (vLLM: engines/server.py)",
                           "rollout server")
    rollout_args: list = opt([], "KEY=VALUE ...: model, reload, reload_body, concurrency, timeout, retries, tolerance "
                             "(engines/server.py)", "rollout server")


ARGS = dict(
    model="",  # the name that the server has for the policy (empty: whatever it serves)
    reload="/collective_rpc",  # path on the server that loads new weights
    # JSON to post there; FOLDER becomes the path of RUN_DIR/rollout_weights
    reload_body='{"method": "reload_weights", "kwargs": {"weights_path": "FOLDER"}}',
    concurrency=256,  # requests under way at once, of each process
    timeout=600.0,  # seconds that one request, or a reload, may take
    retries=2,  # times a request is sent again after a lost connection or HTTP 5xx
    tolerance=0.1,  # mean |log-prob of the server - of the trainer| in nats that ends the run (0: never)
)


class _AsIs(urllib.request.HTTPErrorProcessor):
    http_response = https_response = lambda self, request, response: response  # whatever the status: no redirect is followed


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _AsIs)


def one_line(text, limit=200):
    """Untrusted text or bytes -> one printable line."""
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:limit]


def fetch(url, body, timeout):
    """POST body as JSON -> (status, bytes). OSError (TimeoutError, URLError), HTTPException, UserError."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    end, parts = time.monotonic() + timeout, []
    with OPENER.open(request, timeout=timeout) as answer:
        while part := answer.read1(1 << 16):
            parts.append(part)
            if sum(map(len, parts)) > MAX_BYTES:
                raise UserError(f"{url}: its answer is longer than {MAX_BYTES >> 20} MiB")
            if time.monotonic() > end:  # the socket's own time-out starts anew with every byte
                raise TimeoutError
        if answer.length:  # read1() takes a connection that is cut off for the end
            raise http.client.IncompleteRead(b"", answer.length)
    return answer.status, b"".join(parts)


def post(url, body, timeout, retries=0, hint=""):
    """POST body as JSON -> parsed JSON (None: an empty answer). Lost connections and HTTP 5xx are tried again after 1, 2, 4...
    seconds; a time-out is not: the next try would take as long. UserError, one line: whatever remains."""
    for attempt in range(retries + 1):
        try:
            status, text = fetch(url, body, timeout)
            if status == 200:
                return json.loads(text) if text.strip() else None
            problem, again = f"HTTP {status} {one_line(text)}".strip(), status >= 500
        except (OSError, http.client.HTTPException) as e:
            again = not isinstance(getattr(e, "reason", e), TimeoutError)
            problem = f"connection lost: {one_line(e)}" if again else f"no answer within {timeout:g} s (--rollout-args timeout=)"
        except UserError:
            raise
        except (ValueError, RecursionError):
            problem, again = f"its answer is not JSON: {one_line(text, 80)!r}", False
        if not again or attempt == retries:
            raise UserError(f"{url}: {problem}{hint}")
        time.sleep(2**attempt)


def read_completion(answer, prompt, budget, stops, vocab):
    """A server's answer to one prompt -> (token ids, log-probs, "stop" or "length"). UserError: what is wrong with it."""
    try:
        (choice,) = answer["choices"]
        ids, asked, reason, found = map(choice.get, ("token_ids", "prompt_token_ids", "finish_reason", "logprobs"))
    except (TypeError, KeyError, ValueError, AttributeError):
        raise UserError("its answer holds no completion") from None
    if not isinstance(ids, list) or not isinstance(asked, list):
        raise UserError("it returns no token ids; it must know return_token_ids, as vLLM does from 0.10.2 on")
    if asked != prompt:
        raise UserError("it completed another prompt than the one sent (prompt_token_ids differ)")
    if bad := [i for i in ids if type(i) is not int or not 0 <= i < vocab]:
        raise UserError(f"token id {one_line(bad[0], 30)} is not in the policy's vocabulary of {vocab}: another model?")
    found = found.get("token_logprobs") if isinstance(found, dict) else None
    if not isinstance(found, list) or len(found) != len(ids):
        raise UserError("it returns no log-prob for each token (logprobs.token_logprobs)")
    if not all(type(x) in (int, float) and -1e6 < x < 0.01 for x in found):  # NaN fails too
        raise UserError("its log-probs are none; start vLLM with --logprobs-mode processed_logprobs")
    stopped = bool(ids) and ids[-1] in stops
    whole = stopped if reason == "stop" else reason == "length" and len(ids) == budget
    if not whole or len(ids) > budget or any(i in stops for i in ids[:-1]):
        raise UserError(f"finish_reason {one_line(reason, 20)!r} does not fit {len(ids)} of {budget} tokens that "
                        + ("end" if stopped else "do not end") + " with a stop token")
    return ids, found, "stop" if stopped else "length"


def generate(url, model_name, prompts, *, model, max_new_tokens, temperature, seed, stop_ids, sequence_ids=None, salt="",
             concurrency=256, timeout=600.0, retries=2):
    """Complete every prompt once, on a server -> Rollouts; arguments and result are those of sample.decode_all().

    model: its config says context and vocabulary; the weights are the server's. model_name: "" for the one it serves.
    salt: new with each version of the policy, so that no KV of an older one is used. UserError: the first request that fails.
    """
    begin, stops = time.time(), {int(i) for i in stop_ids}
    out, limit, ids, _, _ = begin_batch(model, prompts, max_new_tokens, sequence_ids, stop_ids)
    budget = (limit - out.prompt_len).tolist()

    def ask(b):  # all that a server's generation_config could set to cut or bend the distribution is set here
        body = dict(prompt=prompts[b], max_tokens=budget[b], temperature=temperature, n=1, top_p=1.0, top_k=-1, min_p=0.0,
                    repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, min_tokens=0, ignore_eos=True,
                    stop_token_ids=sorted(stops), seed=derive(seed, "sequence", int(ids[b])), logprobs=1, return_token_ids=True)
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
            b, (new, logprob, reason) = waiting[future], future.result()
            first, last = len(prompts[b]), len(prompts[b]) + len(new)
            out.tokens[b, first:last], out.logprob[b, first:last] = torch.tensor(new), torch.tensor(logprob)
            out.length[b], out.finish_reason[b] = last, reason
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error: those under way end by their own time-out
    used = int(out.length.max()) if prompts else 1
    out.tokens, out.logprob, out.seconds = out.tokens[:, :used].clone(), out.logprob[:, :used].clone(), time.time() - begin
    return out


def connect(cfg, tokenizer):
    """--rollout-url -> an engine for sample.generate() that hands the policy over first (None without it). Collective under torchrun: rank 0
    writes and asks for the reload, then each process asks for its share. UserError: flags that cannot be."""
    if not cfg.rollout_url:
        return None
    args = key_values(cfg.rollout_args, ARGS, "--rollout-args")
    url = cfg.rollout_url.rstrip("/").removesuffix("/v1")
    folder = Path(cfg.run_dir).resolve() / "rollout_weights"
    try:
        parts = urlsplit(url)
        body = json.loads(args["reload_body"].replace("FOLDER", json.dumps(str(folder))[1:-1]))
    except ValueError as e:
        raise UserError(f"--rollout-url or --rollout-args reload_body cannot be read: {e}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or not args["reload"].startswith("/"):
        raise UserError(f"--rollout-url {url!r} must be like http://HOST:8000, reload {args['reload']!r} like /PATH")
    if args["concurrency"] < 1 or args["timeout"] <= 0 or args["retries"] < 0:
        raise UserError("--rollout-args: concurrency is at least 1, timeout above 0, retries at least 0")
    patience = dict(timeout=args["timeout"], retries=args["retries"])

    def hand_over(model):
        save_model(folder, model, tokenizer)
        hint = "; the policy was not loaded (vLLM needs VLLM_SERVER_DEV_MODE=1)"
        answer = post(url + args["reload"], body, **patience, hint=hint)
        if isinstance(answer, dict) and (answer.get("success") is False or "error" in answer):
            raise UserError(f"{url + args['reload']}: the policy was not loaded: {one_line(json.dumps(answer))}")

    def engine(model, prompts, **options):
        if parallel.rank() == 0:
            hand_over(model)
        parallel.barrier()
        return generate(url, args["model"], prompts, model=model, salt=str(time.time_ns()),
                        concurrency=args["concurrency"], **patience, **options)

    return engine


def require_agreement(cfg, step, difference):
    """Stop where the server drew from another distribution. difference: mean |its log-probs - the trainer's|, in nats."""
    tolerance = key_values(cfg.rollout_args, ARGS, "--rollout-args")["tolerance"]
    if tolerance and not difference <= tolerance:
        raise UserError(f"step {step}: the log-probs of {cfg.rollout_url} differ from the trainer's by {difference:.3g} in the "
                        "mean: it has other or older weights, or leaves the temperature out (vLLM needs --logprobs-mode "
                        "processed_logprobs); --rollout-args tolerance= is the limit, the last checkpoint is intact")
