"""What a person sees at the end: the summary table and the files."""

import copy
import json
import platform
import time

import torch
import transformers
from safetensors.torch import save
from sklearn.metrics import accuracy_score, classification_report

import fuseopt
from fuseopt.finetune.folder import write_all
from fuseopt.finetune.plot import draw
from fuseopt.finetune.train import prunable


def headline(run):
    """Three lines that say what is about to run."""
    options, args = run.options, run.args
    parameters = sum(p.numel() for p in run.model.parameters())
    frozen = sum(p.numel() for p in run.frozen)
    prune = next((g["prune"] for g in run.optimizer.param_groups if g["prune"] is not None), None)
    stages = [f"lr {args.learning_rate:g}", f"decay {args.weight_decay:g}"]
    stages += [f"clip {run.resolved['max_grad_norm']:g}"] if run.resolved["max_grad_norm"] else []
    stages += [f"L1 {options.l1:g}"] if options.l1 else []
    stages += [f"EMA {options.ema_decay:g}"] if options.ema_decay else []
    stages += (
        [f"{options.sparsity:.0%} pruned, from step {prune['begin']} to {prune['end'] or prune['begin']}"]
        if prune
        else []
    )
    start = options.pretrained or "embedded, digits 0-4"
    return (
        f"model      {start}: {parameters:,} parameters, {frozen:,} frozen\n"
        f"data       {options.data or 'digits 5-9'}: {len(run.data.train)} training and {len(run.data.test)} "
        f"test images, classes {' '.join(run.data.names)}\n"
        f"optimizer  {type(run.optimizer).__name__}, backend {run.optimizer.explain().backend}, "
        f"{args.max_steps} steps: {', '.join(stages)}"
    )


def evaluate(run, trainer):
    """Accuracy of every set of weights (from 0 to 1), and the proofs of sparsity and freeze."""
    history = trainer.state.log_history
    found = trainer.predict(run.data.test)
    predictions = {"raw": found.predictions.argmax(-1)}
    accuracy = {"raw": accuracy_score(found.label_ids, predictions["raw"])}
    run.ema_model = None
    if run.options.ema_decay:
        with run.optimizer.swap_ema():
            predictions["ema"] = trainer.predict(run.data.test).predictions.argmax(-1)
            run.ema_model = copy.deepcopy(run.model)
        accuracy["ema"] = accuracy_score(found.label_ids, predictions["ema"])
    return {
        "accuracy": accuracy | _before_pruning(run, history),
        "sparsity": _sparsity(run),
        "frozen": {
            "entries": sum(p.numel() for p in run.frozen),
            "changed": sum(int((p != start).sum()) for p, start in run.frozen.items()),
        },
        "report": {
            name: classification_report(
                found.label_ids,
                chosen,
                labels=range(len(run.data.names)),
                target_names=run.data.names,
                zero_division=0,
                digits=3,
            )
            for name, chosen in predictions.items()
        },
        "curves": history,
    }


def _before_pruning(run, history):
    begins = [g["prune"]["begin"] for g in run.optimizer.param_groups if g["prune"] is not None]
    dense = [row for row in history if begins and row["step"] < min(begins)]
    found = {
        name: [row[key] for row in dense if key in row]
        for name, key in (("raw_before_pruning", "eval_accuracy"), ("ema_before_pruning", "ema_accuracy"))
    }
    return {name: values[-1] for name, values in found.items() if values}


def _sparsity(run):
    """Counts of prunable entries: asked for, marked as pruned, and of those +0.0 in each set of weights."""
    parameters = prunable(run.optimizer)
    total = sum(p.numel() for p in parameters)
    masks = [run.optimizer.prune_mask(p) for p in parameters]
    masks = [
        torch.zeros_like(p, dtype=torch.bool) if mask is None else mask for p, mask in zip(parameters, masks)
    ]
    counts = {
        "prunable": total,
        "asked": round(run.options.sparsity * total),
        "pruned": sum(int(m.sum()) for m in masks),
        "raw_zeros": sum(int((_plus_zero(p) & m).sum()) for p, m in zip(parameters, masks)),
    }
    if run.ema_model is not None:
        averaged = dict(zip(run.model.parameters(), run.ema_model.parameters()))
        counts["ema_zeros"] = sum(int((_plus_zero(averaged[p]) & m).sum()) for p, m in zip(parameters, masks))
    return counts


def _plus_zero(tensor):
    return (tensor == 0) & ~torch.signbit(tensor)


def summary(run, results, verification):
    """The final table, as text."""
    accuracy, counts, frozen = results["accuracy"], results["sparsity"], results["frozen"]
    total, end = max(counts["prunable"], 1), "pruned, at the end" if counts["asked"] else "at the end"
    rows = [
        ("raw, before pruning", accuracy.get("raw_before_pruning"), 0),
        ("EMA, before pruning", accuracy.get("ema_before_pruning"), 0),
        (f"raw, {end}", accuracy["raw"], counts["raw_zeros"] / total),
        (f"EMA, {end}", accuracy.get("ema"), counts.get("ema_zeros", 0) / total),
    ]
    lines = ["", f"{'weights':<24}{'accuracy':>10}{'zeros':>9}"]
    lines += [f"{name:<24}{value:>10.1%}{zeros:>9.1%}" for name, value, zeros in rows if value is not None]
    zeros = f"{counts['raw_zeros']:,} in the raw weights"
    zeros += f", {counts['ema_zeros']:,} in the EMA" if "ema_zeros" in counts else ""
    lines += [
        "",
        f"sparsity  {counts['asked']:,} of {counts['prunable']:,} prunable entries to be +0.0: {zeros}",
        f"frozen    {frozen['changed']:,} of {frozen['entries']:,} entries changed a bit",
        "",
        str(verification) if verification is not None else "no step was verified",
        "",
        *_step_lines(run, results["step"]),
    ]
    return "\n".join(lines)


def _step_lines(run, step):
    if "skipped" in step:
        return [f"step time not compared: {step['skipped']}"]
    lines = [f"{'one optimizer step':<22}{'median':>10}{'quartiles':>20}{'moved':>10}"]
    for label, key in (("fuseopt, one pass", "fuseopt"), ("torch, separate passes", "torch")):
        low, high = step[key]["quartiles"]
        spread, moved = f"{low:.3f} to {high:.3f} ms", step[key]["bytes"] / 1e6
        lines.append(f"{label:<22}{step[key]['ms']:>7.3f} ms{spread:>20}{moved:>7.2f} MB")
    ratio, (low, high) = step["ratio"]["ratio"], step["ratio"]["quartiles"]
    size = sum(p.numel() for p in run.model.parameters())
    same = f"within {step['difference']:.1e}" if step["difference"] else "bit for bit"
    lines += [
        f"ratio {ratio:.1f} (quartiles {low:.1f} to {high:.1f}), {step['steps']} alternated steps, "
        f"{step['threads']} thread(s); both gave the same weights {same}",
        f"a small model, {size:,} parameters: here the calls cost more than the memory",
    ]
    return lines


def write(run, results, verification):
    """Write the model, its EMA, metrics, report, verification and plot to the output folder, and say so."""
    writers = {
        "model.safetensors": lambda path: path.write_bytes(save(run.model.state_dict())),
        "metrics.json": lambda path: path.write_text(
            json.dumps(_metrics(run, results, verification), indent=1) + "\n"
        ),
        "classification_report.txt": lambda path: path.write_text(
            "\n".join(f"{name} weights\n{text}" for name, text in results["report"].items())
        ),
        "plot.png": lambda path: draw(run, results, path),
    }
    if run.ema_model is not None:
        writers["model_ema.safetensors"] = lambda path: path.write_bytes(save(run.ema_model.state_dict()))
    if verification is not None:
        writers["verification.txt"] = lambda path: path.write_text(f"{verification}\n")
    write_all(run.args.output_dir, writers)
    print(f"\nwritten to {run.args.output_dir}: {', '.join(sorted(writers))}")


def _metrics(run, results, verification):
    checked = None
    if verification is not None:
        checked = {
            "passed": verification.passed,
            "every": run.options.verify_every,
            "rows": verification.rows,
        }
    return {
        **{name: results[name] for name in ("accuracy", "sparsity", "frozen", "step")},
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
