"""The main table: one step of fuseopt against torch's optimizers, recipes of separate passes, and other packages.

Every variant is verified first against float64 (check.py) and not timed if that fails; then rounds alternate
all variants and the bandwidth kernels in random order (measure.py). The exit status is 1 if fuseopt was wrong.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler, used for one step a variant, prints

import compare
import record
import report
from case import CASES, DTYPES, RULES, Case
from measure import Settings, run_case
from peers import PEERS
from shapes import SHAPES

STAGES = ("plain", "full", "ema")
HELP = """\
python -m bench                                  the default cases, ten minutes on two cores; JSON and plots
python -m bench --quick                          small tensors and few rounds, to see that it runs
python -m bench --rules adamw --dtypes bf16      of all cases those that match
python -m bench --markdown RESULT.json           the tables of a run
python -m bench --plot RESULT.json               its pictures, beside it
python -m bench --compare OLD.json [NEW.json]    what changed beyond the noise; without NEW: by a run made now
python -m bench host | prune | masks | scaling | finetune | paper | pages    --help tells more
"""


TINY = "tiny 10 200 1000"
# The shapes of a run without arguments: AdamW and all stages on everything, every other rule and dtype on little.
DEFAULT = dict.fromkeys(CASES, "one 200") | {
    "adamw": f"one resnet50 vit gpt2 lora {TINY}",
    "adamw-bf16": f"one gpt2 lora {TINY}",
    "full": f"one resnet50 vit lora {TINY}",
}
QUICK_RUN = {name: "one" for name in CASES if "bf16" not in name} | {"adamw": "one 10", "full": "one 10"}
QUICK_RUN |= {"adamw-bf16": "one", "sgd-bf16": "one", "ema-bf16": "one"}


def chosen(args: argparse.Namespace, old: dict | None = None) -> list[tuple[str, str]]:
    """The (case, shape) pairs that the command line asks for; with an old result, those of them that it has."""
    wanted = (args.rules, args.dtypes, args.stages)
    if not (old or args.all or any(wanted) or args.shapes):
        return [
            (name, shape) for name, shapes in (QUICK_RUN if args.quick else DEFAULT).items() for shape in shapes.split()
        ]
    names = [n for n, parts in CASES.items() if all(w is None or x in w for x, w in zip(parts, wanted, strict=True))]
    if old:
        found = [(case["case"], case["shape"]) for case in old["cases"]]
        return [(name, shape) for name, shape in found if name in names and shape in (args.shapes or SHAPES)]
    shapes = ["one", *TINY.split()] if args.quick else [shape for shape in SHAPES if shape != "fifty"]
    return [(name, shape) for name in names for shape in args.shapes or shapes]


def parse(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    p = argparse.ArgumentParser(
        "python -m bench",
        "python -m bench [COMMAND] [OPTION ...]",
        f"{__doc__.splitlines()[0]}\n\n{HELP}",
        __doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--quick", action="store_true", help="about half a minute; writes nothing without --json")
    p.add_argument("--all", action="store_true", help="every rule, dtype, stage and shape: an hour or more")
    for option, names in (
        ("rules", RULES),
        ("dtypes", DTYPES),
        ("stages", STAGES),
        ("shapes", SHAPES),
        ("peers", PEERS),
    ):
        words = f"only these of: {', '.join(names)}" + ("; none at all without a name" if option == "peers" else "")
        many = "*" if option == "peers" else "+"
        p.add_argument(f"--{option}", nargs=many, choices=names, metavar=option.upper()[:-1], help=words)
    p.add_argument("--markdown", type=Path, metavar="RESULT", help="print the tables of a result and exit")
    p.add_argument("--plot", type=Path, metavar="RESULT", help="draw a result, RESULT-roofline.png and -ratios.png")
    words = "what changed between two results; without NEW, between OLD and a run of the same cases"
    p.add_argument("--compare", type=Path, nargs="+", metavar=("OLD", "NEW"), help=words)
    record.common(p)
    args = p.parse_args(argv)
    if args.compare and len(args.compare) > 2:
        p.error("--compare takes one or two results")
    return p, args


def settings(quick: bool) -> Settings:
    """How long a case may take."""
    if quick:
        return Settings(seconds_small=0.1, seconds_host=0.05, least_rounds=5, most_rounds=30)
    return Settings()


def run(p: argparse.ArgumentParser, args: argparse.Namespace, cases: list[tuple[str, str]]) -> dict:
    """Measure, printing each table as it comes."""
    result = {**record.begin(p, args, "step"), "cases": []}
    print(report.machine(result))
    peers = list(PEERS) if args.peers is None else args.peers
    for name, shape in cases:
        result["cases"].append(run_case(Case(name, shape, args.quick), settings(args.quick), peers))
        print("\n" + report.table(result["cases"][-1]), flush=True)
    print("\n" + "\n\n".join(filter(None, (report.untimed(result), report.targets(result), report.NOTES))))
    return result


def wrong(result: dict) -> bool:
    """Whether fuseopt failed a check. A peer that does is only said to."""
    rows = [row for case in result["cases"] for row in case["variants"]]
    return any("problem" in row and row["family"] in ("fuseopt", "") for row in rows)


def main(argv: list[str] | None = None) -> int:
    p, args = parse(argv)
    if args.markdown:
        print(report.markdown(record.read(args.markdown, "cases")))
        return 0
    if args.plot:
        return draw(record.read(args.plot, "cases"), args.plot)
    old = [record.read(path, "cases") for path in args.compare or ()]
    if len(old) == 2:
        print(compare.text(*old))
        return 0
    if old:  # as it was measured
        args.quick |= old[0]["quick"]
        args.threads = args.threads or min(old[0]["threads"], os.cpu_count() or 1)
    cases = chosen(args, *old)
    if not cases:
        p.error("no case has all that --rules, --dtypes, --stages and --shapes ask for, and OLD of --compare, if given")
    result = run(p, args, cases)
    if old:
        print("\n" + compare.text(old[0], result))
    if args.json or not (args.quick or old):
        draw(result, record.finish(args, result))
    return int(wrong(result))


def draw(result: dict, path: Path) -> int:
    """Both pictures, beside the result; says so where there is no matplotlib."""
    try:
        import plot
    except ModuleNotFoundError as error:
        print(f"no pictures: {error}")
        return 1
    for picture in plot.draw(result, path):
        print(f"written: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
