"""What `python -m train` does, once its options are read."""

import dataclasses
import json
import os
from collections.abc import Set

import torch

from cache_spec.copies import copies_for
from cache_spec.counts import parse_count
from cache_spec.errors import UserError
from cache_spec.remote import open_cache
from train.config import DataConfig
from train.grid import Lists, Settings, check_target, make_runs
from train.loader import MixedBatchLoader
from train.options import Options
from train.parallel.limits import refuse_spread
from train.passes import free_memory, parse_memory
from train.preparing import shares_of
from train.ranks import Team, joined, read_rank
from train.reading import before_training, read_device, read_hook, read_lists, with_preset
from train.report import keep_freed_memory, plan_facts, print_plan, print_preset, print_results
from train.sweep import Unfinished, failures_sentence, train_sweep
from train.timetable import schedule_for
from train.tracking import open_trackers


def run(options: Options, given: Set[str]) -> None:
    """Train the grid; `given` are the options that the command line names. torchrun's processes share it.

    Raises UserError, before anything is written, for what cannot be done, and Unfinished in the end if a run failed.
    """
    with joined(read_rank(os.environ), parallel=options.parallel, device=options.device) as team:
        _run(options, given, team)


def _run(options: Options, given: Set[str], team: Team) -> None:
    if options.json and not options.dry_run:
        raise UserError("--json says what a sweep will take; give it together with --dry-run")
    options, preset = with_preset(options, given)
    open_tracker = open_trackers(options.track)
    lists = read_lists(options)
    if options.profile and options.dry_run:
        raise UserError("--profile looks at steps of training and --dry-run makes none; leave one of them out")
    memory = parse_memory(options.memory) if options.memory else None
    loader = _open(options, lists, team)
    schedule = schedule_for(
        loader,
        warmup_steps=options.warmup_steps,
        decay_start=options.decay_start,
        sparsity_warmup_steps=options.sparsity_warmup_steps,
        anneal_start=options.anneal_start,
        threshold_start=options.threshold_start,
        threshold_beta=options.threshold_beta,
        dead_tokens=options.dead_tokens,
    )
    settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    runs = make_runs(lists, schedule, loader.scale, loader.data, settings)
    check_target(loader.data, runs, force=options.force)
    n_threads = torch.get_num_threads() if loader.device.type == "cpu" else 1
    refuse_spread(runs, loader, team.spread)
    memory = memory or team.part_of(free_memory(loader.device))
    if team.is_first:
        shares = shares_of(runs, loader, options.kernel, team)
        if options.json:
            facts = plan_facts(loader, shares, n_threads, memory, options.kernel, team.parallel, team.spread)
            print(json.dumps(facts))
            return
        print_preset(options.preset, preset)
        print_plan(loader, shares, n_threads, memory, options.kernel, team.spread)
    if options.dry_run:
        return
    keep_freed_memory()
    facts = train_sweep(
        loader,
        runs,
        out=options.out,
        kernel=options.kernel,
        checkpoint_every=options.checkpoint_every or max(500, loader.n_steps // 20),
        resume=options.resume,
        n_threads=n_threads,
        memory=memory,
        open_tracker=open_tracker,
        profile=options.profile and team.is_first,
        team=team,
    )
    if team.is_first:
        print_results(facts, options.out)
    if sentence := failures_sentence(facts):
        raise Unfinished(sentence)


def _open(options: Options, lists: Lists, team: Team) -> MixedBatchLoader:
    with before_training():
        cache = open_cache(
            options.cache,
            copies_for(options.cache, options.cache_dir, options.cache_bytes),
            allow_partial=options.allow_partial,
        )
        data = DataConfig(
            hook=read_hook(cache, options.hook),
            n_tokens=parse_count(options.tokens, "--tokens") if options.tokens else cache.plan.n_train_rows,
            batch_size=options.batch_size,
            masked_variant=options.masked_variant,
            positions=options.positions,
            target=options.target,
            seed=options.data_seed,
            open_shards=options.open_shards,
            target_hook=cache.hook(options.target_hook).name if options.target_hook else "",
            io=options.io,
            readers=options.readers,
            read_ahead=options.read_ahead,
        )
        device = read_device(team.device)
        return MixedBatchLoader(cache, data, with_masked=lists.want_masked, device=device, team=team)
