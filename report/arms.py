"""The table of arms: what each arm of a comparison is rewarded by, and how it is drawn.

A new arm is one line here. The pipeline plans its stages from the line and the report takes its
colour and label from it; an arm that is not in the table is drawn in grey under its own name.
Imports nothing.
"""

from dataclasses import dataclass, field, replace

GREY = "#7f7f7f"


@dataclass(frozen=True)
class Arm:
    reward: str  # --reward of the RL run
    verifier: str | None  # the stage whose verifier the reward needs; None: the reward needs none
    flags: dict = field(default_factory=dict)  # other settings of the RL run that make the arm
    colour: str = GREY
    label: str = ""
    policy: str = "sft"  # the stage whose policy the RL run starts from
    control: bool = False  # expected to be worse: its run does not shorten the others' curves
    longer: bool = False  # as many steps as pay for another arm's RL and its verifier together


# One colour an arm in every figure (Okabe-Ito and Tol, safe for colour-blind readers). The order is
# that of the tables, the legends and the solutions on the page.
ARMS = {
    "pav": Arm("pav", "verifier", colour="#009E73", label="PAV"),
    "q": Arm("q", "verifier", colour="#D55E00", label="Q as reward"),
    "orm": Arm("orm", "verifier_outcome", colour="#0072B2", label="learned outcome model"),
    "mrt": Arm("mrt", None, colour="#882255", label="MRT"),
    "outcome": Arm("outcome", None, colour="#000000", label="outcome only"),
    "outcome-long": Arm(
        "outcome", None, colour="#7f7f7f", label="outcome only, more steps", longer=True
    ),
    "outcome-prover": Arm(
        "outcome", None, colour="#999933", label="outcome only, from the prover", policy="prover"
    ),
    "constant": Arm(
        "pav", None, {"verifier": "constant"}, "#E69F00", "control: constant value",
        control=True,
    ),
    "base-prover": Arm(
        "pav", "verifier_base", colour="#56B4E9", label="control: prover = base", control=True
    ),
    "strong-prover": Arm(
        "pav", "verifier_strong", colour="#CC79A7", label="control: prover too strong", control=True
    ),
}

REWARDS = list(dict.fromkeys(arm.reward for arm in ARMS.values()))  # choices of --reward


def arm_of(name):
    """The arm's line of the table; for a name that is not in it a grey arm of that name. "pav
    (steps=3)" is the arm pav with other settings: grey too, labelled with them."""
    if name in ARMS:
        return ARMS[name]
    known, _, settings = name.partition(" (")
    if known in ARMS:
        arm = ARMS[known]
        return replace(arm, colour=GREY, label=f"{arm.label} ({settings}")
    return Arm(reward=name, verifier=None, label=name)


def in_order(names):
    """Names in the table's order; those that are not in the table last, as they came."""
    return [n for n in ARMS if n in names] + [n for n in names if n not in ARMS]
