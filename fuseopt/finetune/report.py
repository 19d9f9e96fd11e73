"""What a person sees at the end: each set of weights evaluated, the summary table, and the files."""

import copy
import functools
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, f1_score

import fuseopt
from fuseopt.finetune import measure, models, plot, quantize
from fuseopt.finetune.folder import as_json, write_all
from fuseopt.finetune.stages import pruning
from fuseopt.finetune.table import decimals, percent, size, table

MATRIX_CLASSES = 30  # a confusion matrix of more is given as its most frequent confusions
LABELS = {"raw": "raw weights", "average": "averaged weights", "int8": "8-bit weights"}
FILES = {"raw": "model", "average": "model_average", "int8": "model_int8"}


def headline(run):
    """Three lines that say what is about to run."""
    options, args, optimizer = run.options, run.args, run.optimizer
    fixed = {p for p in run.model.parameters() if not p.requires_grad} | set(run.frozen)
    frozen = f"; {sum(p.numel() for p in fixed):,} frozen" if fixed else ""
    prune = pruning(optimizer)
    backend = f", backend {optimizer.explain().backend}" if hasattr(optimizer, "explain") else ""
    stages = [f"learning rate {args.learning_rate:g}", f"decay {args.weight_decay:g}"]
    stages += [f"clip {run.max_grad_norm:g}"] if run.max_grad_norm else []
    stages += [f"L1 {options.l1:g}"] if options.l1 else []
    stages += [f"average {options.average}"] if options.average != "none" else []
    stages += [f"pruning at steps {prune['begin']} to {prune['end'] or prune['begin']}"] if prune else []
    return (
        f"model      {run.start.description}{frozen}\n"
        f"data       {run.data.description}\n"
        f"optimizer  {type(optimizer).__name__}{backend}, {args.max_steps:,} steps: {', '.join(stages)}"
    )


def evaluate(run, trainer):
    """Every set of weights on the test rows, the proofs of sparsity and freeze, times and memory.

    Sets run.averaged and run.int8, the models with averaged and with 8-bit weights, or None. Returns plain data.
    """
    test, history = trainer.eval_dataset, trainer.state.log_history
    scores = {"raw": _score(run, trainer.predict(test))}
    run.averaged = run.int8 = None
    if run.optimizer.param_groups[0].get("ema"):
        with run.optimizer.swap_ema():
            scores["average"] = _score(run, trainer.predict(test))
            run.averaged = copy.deepcopy(run.model)
    if run.options.quantize:
        run.int8 = quantize.quantized(run.averaged or run.model)
        scores["int8"] = _score(run, _predict_with(trainer, run.int8, test))
    results = {key: {name: score[key] for name, score in scores.items()} for key in scores["raw"]}
    results["accuracy"] |= _before_pruning(run, history, "accuracy")
    results["loss"] |= _before_pruning(run, history, "loss")
    return {
        **results,
        "sparsity": measure.sparsity(run),
        "frozen": measure.frozen(run),
        "time": trainer.step_times.summary(),
        "memory": measure.memory(run),
        "curves": history,
    }


def used(results):
    """The set of weights that one would use: the average where there is one, else the raw weights."""
    return "average" if "average" in results["accuracy"] else "raw"


def _predict_with(trainer, model, rows):
    """trainer.predict() with another model of the same inputs and outputs."""
    before = trainer.model
    trainer.model = model
    try:
        return trainer.predict(rows)
    finally:
        trainer.model = before


def _score(run, found):
    """Accuracy, macro F1, mean cross entropy (no label smoothing, no teacher), report and matrix."""
    logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    labels, names = found.label_ids, run.data.names
    chosen, numbers = logits.argmax(-1), range(len(names))
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(np.float64(logits)), torch.from_numpy(labels))
    shown = {"labels": numbers, "target_names": names, "zero_division": 0, "digits": 3}
    return {
        "accuracy": float(accuracy_score(labels, chosen)),
        "macro_f1": float(f1_score(labels, chosen, labels=numbers, average="macro", zero_division=0)),
        "loss": float(loss),
        "confusion": confusion_matrix(labels, chosen, labels=numbers).tolist(),
        "report": classification_report(labels, chosen, **shown),
    }


def _before_pruning(run, history, metric):
    """The last evaluation before the first step that prunes, of each set of weights."""
    prune = pruning(run.optimizer)
    dense = [row for row in history if prune and row["step"] < prune["begin"]]
    keys = {"raw_before_pruning": f"eval_{metric}", "average_before_pruning": f"average_{metric}"}
    found = {name: [row[key] for row in dense if key in row] for name, key in keys.items()}
    return {name: values[-1] for name, values in found.items() if values}


def summary(run, results, verification):
    """The final table, as text."""
    lines = ["", *_weights_table(results), ""]
    lines += _figures(results)
    lines += ["", str(verification) if verification is not None else "no step was verified"]
    step = results.get("step", {"skipped": "--compare_steps 0"})
    if step.get("skipped") != "--compare_steps 0":
        lines += ["", *_step_lines(run, step)]
    return "\n".join(lines)


def _weights_table(results):
    counts, sizes = results["sparsity"], results.get("size", {})
    rows = []
    for key, label in LABELS.items():
        before = f"{key}_before_pruning"
        if before in results["accuracy"]:
            values = results["accuracy"][before], None, results["loss"].get(before)
            rows.append((f"{label}, before pruning", values, None, None))
        if key in results["accuracy"]:
            values = [results[name][key] for name in ("accuracy", "macro_f1", "loss")]
            zeros = counts.get(f"{key}_zeros")
            share = None if zeros is None else zeros / max(counts["prunable"], 1)
            rows.append((label, values, share, sizes.get(FILES[key])))
    return table(
        ("on the test rows", "accuracy", "macro F1", "loss", "zeros", "size"),
        [(name, percent(a), decimals(f), decimals(x), percent(z), size(b)) for name, (a, f, x), z, b in rows],
    )


def _figures(results):
    """Times, memory and the two proofs, one line each."""
    times, memory = results["time"], results["memory"]
    counts, frozen = results["sparsity"], results["frozen"]
    lines = []
    if not math.isfinite(results["loss"]["raw"]):
        lines.append("diverged  the loss is not finite: train with a lower --learning_rate")
    if times["train_step_ms"]:
        step, optimizer = (_spread_text(times[f"{name}_step_ms"], "median") for name in ("train", "optimizer"))
        checks = ", checks included" if times.get("with_checks") else ""
        lines.append(f"step      {step}, its optimizer step {optimizer}{checks}")
        lines.append(f"training  {times['steps']:,} steps in {times['seconds']:.1f} s, evaluations included")
    peak = size(memory["peak_bytes"]) or "not known here"
    lines.append(f"memory    {peak} at the peak, {size(memory['optimizer_state_bytes'])} of it optimizer state")
    if counts["asked"]:
        unit = counts["unit"]
        zeros = f"{counts['raw_zeros']:,} in the raw weights"
        zeros += f", {counts['average_zeros']:,} in the average" if "average_zeros" in counts else ""
        lines.append(f"pruned    {counts['asked']:,} of {counts['prunable']:,} {unit} to be +0.0: {zeros}")
    if frozen["entries"]:
        lines.append(f"frozen    {frozen['changed']:,} of {frozen['entries']:,} entries changed a bit")
    return lines


def _spread_text(spread, name):
    low, high = spread["quartiles"]
    return f"{spread[name]:.3f} ms ({low:.3f} to {high:.3f})"


def _step_lines(run, step):
    if "skipped" in step:
        return [f"not compared with torch: {step['skipped']}"]
    lines = [f"{'one optimizer step':<22}{'median':>10}{'quartiles':>20}{'moved':>10}"]
    for label, key in (("fuseopt, one pass", "fuseopt"), ("torch, separate passes", "torch")):
        low, high = step[key]["quartiles"]
        spread = f"{low:.3f} to {high:.3f} ms"
        lines.append(f"{label:<22}{step[key]['ms']:>7.3f} ms{spread:>20}{size(step[key]['bytes']):>10}")
    ratio, (low, high) = step["ratio"]["ratio"], step["ratio"]["quartiles"]
    parameters = sum(p.numel() for p in run.model.parameters())
    same = f"within {step['difference']:.1e}" if step["difference"] else "bit for bit"
    lines.append(
        f"ratio {ratio:.1f} (quartiles {low:.1f} to {high:.1f}), {step['steps']} alternated steps, "
        f"{step['threads']} thread(s); both gave the same weights {same}"
    )
    if parameters < 1_000_000:
        lines.append(f"a small model, {parameters:,} parameters: here the calls cost more than the memory")
    return lines


def write(run, results, verification):
    """Write models, metrics, report, verification and plots to the output folder: all of them or none.

    Fills in results["size"], so that a summary made afterwards knows it.
    """
    results["size"] = {}
    results["time"]["with_checks"] = verification is not None
    _carry_over(run, results)
    chosen = used(results)
    writers = _model_writers(run, results["size"]) | {
        "metrics.json": lambda path: path.write_text(as_json(_metrics(run, results, verification)), encoding="utf-8"),
        "report.txt": lambda path: path.write_text(_report(run, results, verification), encoding="utf-8"),
        "confusion.png": lambda path: plot.confusion(
            results["confusion"][chosen], run.data.names, f"Confusions of the {LABELS[chosen]}", path
        ),
        "plot.png": lambda path: plot.draw(run, results, path),
    }
    if verification is not None:
        writers["verification.txt"] = f"{verification}\n"
    write_all(run.args.output_dir, writers)


def _carry_over(run, results):
    """Of a run that had been finished and is only written anew: its times, and what its verification found."""
    before = Path(run.args.output_dir) / "metrics.json"
    if not results["time"]["steps"] and before.is_file():
        results |= {name: json.loads(before.read_text())[name] for name in ("time", "verification")}


def _model_writers(run, sizes):
    """{folder name: function that writes the model there and notes the bytes of its weights in sizes}."""

    def write(save, model, path):
        save(model, run.processor, path)
        sizes[path.name] = sum(file.stat().st_size for file in path.glob("*.safetensors"))

    kept = {"model": run.model, "model_average": run.averaged, "model_int8": run.int8}
    saves = {"model_int8": _save_int8}
    return {
        name: functools.partial(write, saves.get(name, models.save), model)
        for name, model in kept.items()
        if model is not None
    }


def _save_int8(model, processor, folder):
    """The 8-bit weights, for quantize.load, beside the configuration of the model and its processor."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    quantize.save(model, folder / "model.safetensors")


def _report(run, results, verification):
    """report.txt: the summary, then the classification report and the confusions of each set of weights."""
    parts = [summary(run, results, verification).lstrip("\n")]
    for name, text in results["report"].items():
        confusions = confusion_text(results["confusion"][name], run.data.names)
        parts.append(f"{LABELS[name]}\n\n{text}\n{confusions}")
    return "\n\n".join(parts) + "\n"


def confusion_text(matrix, names):
    """A confusion matrix as text, rows being the true classes; of many classes the most frequent confusions."""
    if len(names) <= MATRIX_CLASSES:
        short = [name if len(name) <= 12 else f"{name[:11]}…" for name in names]
        return "\n".join(table(("true \\ found", *short), [(s, *row) for s, row in zip(short, matrix)]))
    wrong = [(row[k], names[t], names[k]) for t, row in enumerate(matrix) for k in range(len(names)) if k != t]
    most = sorted((one for one in wrong if one[0]), key=lambda one: -one[0])[:20]
    if not most:
        return "no row was confused"
    return "\n".join(table(("true", "found as", "rows"), [(t, k, n) for n, t, k in most], left=2))


def _metrics(run, results, verification):
    """What metrics.json holds."""
    checked = results.get("verification")
    if verification is not None:
        checked = {"passed": verification.passed, "steps": verification.steps, "rows": verification.rows}
    kept = ("accuracy", "macro_f1", "loss", "confusion", "sparsity", "frozen", "time", "memory", "size", "step")
    return {
        **{name: results[name] for name in kept if name in results},
        "classes": run.data.names,
        "verification": checked,
        "options": run.resolved,
        "versions": {
            "fuseopt": fuseopt.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "curves": results["curves"],
    }
