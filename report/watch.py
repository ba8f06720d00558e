"""What is watched during RL: accuracy on held-out problems, what the verifier believes of the same solutions, lengths.

Called by the loops of train_rl.py and papers/mrt.py; their lines of metrics.jsonl are what `python -m report` draws.
"""

from infra.runs import mean, read_metrics
from infra.seeds import derive
from report.solutions import write_solutions
from rollouts import grades, step_ends
from sample import generate
from verifier import single_sample_value, step_values


def evaluate(model, tokenizer, task, verifier, cfg, limit, path=None):
    """Sampled accuracy on held-out problems, and the verifier's value of the same solutions (of one
    sample, not of Best-of-K: it is compared with accuracy). Some solutions are written to path."""
    problems = task.problems(cfg.eval_split, cfg.eval_problems, 0)
    problems = (problems * (1 + cfg.eval_problems // len(problems)))[: cfg.eval_problems]
    prompts = [task.prompt_tokens(p, tokenizer) for p in problems]
    rolled = generate(
        model,
        prompts,
        max_new_tokens=limit,
        temperature=cfg.temperature,
        seed=derive(0, "evaluation"),
        stop_ids=task.stop_ids(tokenizer),
    )
    outcome = grades(task, problems, rolled, tokenizer)
    logs = {"eval/accuracy": mean(outcome.tolist())}
    if verifier is not None:
        ends = step_ends(task, rolled, tokenizer, credit=True)
        values = step_values(verifier, rolled.tokens, ends)
        logs["eval/verifier_score"] = mean_final_value(values, verifier)
        if path is not None:
            write_solutions(path, tokenizer, problems, rolled, outcome.tolist(), values, ends)
    return logs


def mean_final_value(values, verifier):
    """values [B,S+1] -> what the verifier believes of the whole solutions, as the value of one sample."""
    return float(single_sample_value(values[:, -1], getattr(verifier, "k", 1)).mean())


def rollout_logs(rollouts):
    """What is logged of a batch of samples."""
    tokens = rollouts.num_tokens()
    return {
        "completions/mean_length": tokens / len(rollouts),
        "completions/clipped_ratio": mean(r == "length" for r in rollouts.finish_reason),
        "tokens_per_second": tokens / rollouts.seconds,
    }


def summarize(run, num_tokens, episodes, name, **more):
    """summary.json of an RL run, and one line for people. -> summary."""
    curve = [row["eval/accuracy"] for row in read_metrics(run.folder) if "eval/accuracy" in row]
    summary = run.finish(
        accuracy=curve[-1], num_tokens=num_tokens, episodes=episodes, curve_mean=mean(curve), **more
    )
    print(
        f"{name}: {curve[0]:.3f} -> {curve[-1]:.3f} after {run.cfg.steps} steps, {num_tokens} "
        f"tokens, "
        f"{summary['seconds']:.0f} s -> {run.folder}"
    )
    return summary
