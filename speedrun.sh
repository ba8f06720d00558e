#!/usr/bin/env bash
# The default comparison, one seed, as plain commands: what `python train_rl.py --reward pav` runs (a test holds them equal).
# Two to three minutes on one core. Each command can be killed and typed again: it goes on from its last checkpoint.
set -euo pipefail
export OMP_NUM_THREADS=1

# 1. The base policy: imitate a demonstrator that seldom knows what it is doing. It solves 0.3% of the task.
python train_sft.py --strength 5 --threads 1 --run-dir runs/speedrun/seed0/sft

# 2. The prover: the clone of a better demonstrator (10%). It never acts in RL; it says what a prefix is worth.
python train_sft.py --strength 16 --threads 1 --run-dir runs/speedrun/seed0/prover

# 3. The verifier V^mu: cut 40,000 solutions of the base, let the prover finish them, fit a value at every step end.
python pav.py --policy runs/speedrun/seed0/sft --prover runs/speedrun/seed0/prover --prover-strength 16 \
    --num-problems 40000 --threads 1 --run-dir runs/speedrun/seed0/verifier

# 4. RL paid by progress: the outcome, and for each step V^mu after it minus V^mu before it.
python train_rl.py --reward pav --policy runs/speedrun/seed0/sft --verifier runs/speedrun/seed0/verifier \
    --num-prompts 4 --num-generations 32 --threads 1 --run-dir runs/speedrun/seed0/rl_pav

# 5. RL paid by the outcome alone, with as many samples; the verifier only watches.
python train_rl.py --reward outcome --policy runs/speedrun/seed0/sft --verifier runs/speedrun/seed0/verifier \
    --num-prompts 4 --num-generations 32 --threads 1 --run-dir runs/speedrun/seed0/rl_outcome

# The table, curves.png and report.html of both arms.
python -m report runs/speedrun
