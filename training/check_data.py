"""Checks before a training: the data, the plan that follows from it, and whether memory and disk suffice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace

from common import Config, Message
from runs.disk import existing_folder
from runs.folder import read_run
from training import hardware, packing, resume
from training.findings import Finding, Run, fault, note, ok
from training.inputs import describe_inputs, find_changes
from training.memory import (
    GB,
    checkpoint_bytes,
    estimate_memory,
    forward_tokens,
    needs,
    replies_memory,
    sequences,
    smallest_change,
)
from training.plan import (
    TrainingPlan,
    describe_count,
    describe_evaluations,
    describe_steps,
    find_warnings,
    make_plan,
)

CLEARLY = 1.2  # an estimate of memory that is so many times what is free is taken at its word


def check_template(run: Run) -> Iterator[Finding]:
    from preprocessing.template import check_name

    run.template_exists = False
    if run.config.template is not None:
        check_name(run.config.template)
    run.template_exists = True
    yield from ()


def check_rows(run: Run) -> Iterator[Finding]:
    """The rows of small data files, without tokenizing."""
    from preprocessing import dataset

    dataset.check(run.config)
    yield from ()


def check_batches(run: Run) -> Iterator[Finding]:
    if run.can_tokenize:
        run.config, changed = packing.fit_batches(run.config)
        if changed:
            yield note(changed)


def check_data(run: Run) -> Iterator[Finding]:
    """Tokenizes the data, of which every faulty row is named, and plans the training."""
    from preprocessing import dataset
    from preprocessing.template import load_template
    from preprocessing.tokenizer import load_base_tokenizer

    if not run.can_tokenize:
        yield from _count_conversations(run)
        return
    run.tokenizer = load_base_tokenizer(run.config)
    run.template = load_template(run.config.template, run.tokenizer, run.config.stage)
    run.data = dataset.prepare(run.config, run.tokenizer, run.template)
    lengths = run.data.train_lengths
    tokens, longest = int(lengths.sum()), int(lengths.max())
    yield ok(
        Message(
            "{samples:,} samples, {tokens:,} tokens, the longest {longest:,}",
            samples=len(lengths),
            tokens=tokens,
            longest=longest,
        )
    )


def _count_conversations(run: Run) -> Iterator[Finding]:
    """What is known of a run before its data can be tokenized."""
    from preprocessing import dataset

    conversations = len(dataset.read_conversations(run.config)[0])
    yield ok(
        Message(
            "{conversations:,} conversations; their tokens are counted once the model is there",
            conversations=conversations,
        )
    )
    steps = packing.total_steps(run.processes.as_one(run.config), conversations)
    batch, accumulation = run.config.per_device_train_batch_size, run.config.gradient_accumulation_steps
    limit = Message("at most ") if run.config.packing and run.config.max_steps <= 0 else ""
    each = describe_count(run.processes)
    yield ok(
        Message(
            "{limit}{steps:,} optimizer steps of {batch} x {accumulation}{each}",
            limit=limit,
            steps=steps,
            batch=batch,
            accumulation=accumulation,
            each=each,
        )
    )


def check_inputs(run: Run) -> Iterator[Finding]:
    """Whether an interrupted run goes on with the data, model, tokenizer and template that it was begun with.

    Others are accepted where the checkpoint is named: whoever names it has read what differs.
    """
    if run.data is None:
        return
    run.inputs = describe_inputs(run.model.folder, run.template, run.data)
    checkpoint = run.resume.checkpoint
    if checkpoint is None or not checkpoint.resolve().is_relative_to(run.folder.resolve()):
        return
    recorded = (read_run(run.folder) or {}).get("inputs")
    changes = find_changes(recorded, run.inputs) if recorded else []
    if changes and run.config.resume_from_checkpoint in (None, "true"):
        yield fault(
            Message(
                "{folder} was begun with other inputs:\n"
                "  {changes:lines}\n"
                "put them back as they were, or start over with overwrite_output_dir=true; to go on all the same, name "
                "the checkpoint: resume_from_checkpoint={checkpoint}",
                folder=run.folder,
                changes=changes,
                checkpoint=checkpoint,
            )
        )
    elif changes:
        yield note(
            Message(
                "{folder} goes on with other inputs than it was begun with:\n  {changes:lines}",
                folder=run.folder,
                changes=changes,
            )
        )


def check_plan(run: Run) -> Iterator[Finding]:
    if run.data is None:
        return
    run.plan = make_plan(run.processes.as_one(run.config), run.data)
    resume.check_steps_left(run.resume, run.folder, run.plan)
    yield ok(describe_steps(run.config, run.plan, run.processes))
    yield ok(Message("held out: {held_out}", held_out=describe_evaluations(run.config, run.plan)))
    for warning in find_warnings(run.config, run.plan):
        yield note(warning)


def check_memory(run: Run) -> Iterator[Finding]:
    """Compares the estimate with what is free, and names the smallest change that makes the recipe fit.

    A micro-batch that does not fit is split while it trains (training/splitting.py), so that only a longest sample
    which by itself needs clearly more than a card has is a reason not to begin.
    """
    if run.model is None:
        yield note(Message("how much memory and disk it takes is told once the model is there"))
        return
    config = run.config
    longest = run.plan.longest if run.plan and not config.packing else config.cutoff_len * sequences(config)
    try:
        parts = estimate_memory(config, run.model, forward_tokens(config, longest, run.gpu), run.gpu)
        parts["replies"] = replies_memory(config, run.model, longest, run.gpu)
    except KeyError:
        yield note(Message("cannot be estimated for this kind of model"))
        return
    need = sum(parts.values())
    have = run.gpu.free_memory if run.gpu else hardware.free_memory() / run.processes.here
    limit = "" if run.plan or config.packing else Message("at most ")
    finding = Message(
        "{limit}about {need:.1f} GB at the peak ({parts}), {have:.1f} GB are free",
        limit=limit,
        need=need / GB,
        parts=_memory_parts(parts),
        have=have / GB,
    )
    if need <= have:
        yield ok(finding)
        return
    change = smallest_change(config, run.model, longest, run.gpu, have)
    if change is None:
        yield fault(Message("memory: {estimate}; no setting makes it fit: take a smaller model", estimate=finding))
    else:
        settings = " ".join(f"{name}={value}" for name, value in change.items())
        yield fault(Message("memory: {estimate}; this would fit: {settings}", estimate=finding, settings=settings))


def cannot_begin(run: Run) -> bool:
    """Whether the longest sample alone needs clearly more memory than the card has free.

    Never so without a card: there the system swaps, and the estimate is rougher.
    """
    if run.gpu is None or run.plan is None:
        return False
    alone = replace(run.config, per_device_train_batch_size=1)
    try:
        return needs(alone, run.model, run.plan.longest, run.gpu) > CLEARLY * run.gpu.free_memory
    except KeyError:
        return False


def _memory_parts(parts: dict[str, float]) -> list[Message]:
    named = [
        Message("weights {gb:.1f}", gb=parts["weights"] / GB),
        Message("adapter {gb:.1f}", gb=parts["adapter"] / GB),
        Message("activations {gb:.1f}", gb=parts["activations"] / GB),
        Message("logits {gb:.1f}", gb=parts["logits"] / GB),
        Message("attention mask {gb:.1f}", gb=parts["attention"] / GB),
        Message("replies {gb:.1f}", gb=parts["replies"] / GB),
        Message("runtime {gb:.1f}", gb=parts["runtime"] / GB),
    ]
    return [part for part in named if part.fields["gb"] >= 0.05]


def check_disk(run: Run) -> Iterator[Finding]:
    """Whether the checkpoints of the whole run have space, and what is made of it after."""
    if run.model is None:
        return
    folder = existing_folder(run.folder)
    free = shutil.disk_usage(folder).free
    checkpoints = checkpoint_bytes(run.config, run.model) * checkpoints_at_once(run.config, run.plan)
    fetched = 0 if run.model.folder else run.model.bytes
    exports = 2 * run.model.bytes
    model = Message("the model takes about {gb:.1f} GB, ", gb=fetched / GB) if fetched else ""
    finding = Message(
        "{free:.1f} GB are free in {folder}; {model}checkpoints take about {checkpoints:.2f} GB, the merged model "
        "and a 16-bit GGUF {exports:.1f} GB more",
        folder=folder,
        free=free / GB,
        model=model,
        checkpoints=checkpoints / GB,
        exports=exports / GB,
    )
    if free < fetched + checkpoints:
        yield fault(
            Message(
                "{estimate}: too little to train; free some space, lower save_total_limit, or set output_dir to "
                "another disk",
                estimate=finding,
            )
        )
    elif free < fetched + checkpoints + exports:
        yield note(Message("{estimate}: enough to train, not to export", estimate=finding))
    else:
        yield ok(finding)


def checkpoints_at_once(config: Config, plan: TrainingPlan | None) -> int:
    """The most checkpoints that are on the disk at one time, the one being written and the final adapter included."""
    saves = plan.count_saves() if plan else 10
    kept = saves if config.save_total_limit is None else min(saves, config.save_total_limit + 1)  # and the best one
    return kept + 2
