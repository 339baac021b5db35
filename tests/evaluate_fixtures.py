"""A planted world for the tests of evaluate: orthogonal parent and child directions, and SAEs built by hand."""

from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_fixtures import make_plan, make_shard

from cache_spec import ActivationCache, UserError, create_cache, finalize_cache, write_shard
from evaluate.language import EVERYWHERE, Language
from evaluate.rows import Rows
from evaluate.subject import Bench, Dictionary, Learned, Subject
from evaluate.tasks import ProbeData
from harvest.model import load_model
from train.activations import Threshold
from train.run_folder import finish_run
from train.sae import SparseAutoencoder, initialise

Relation = namedtuple("Relation", "family parent child positions")
ProbeTask = namedtuple("ProbeTask", "name attribute positions")

N_PARENTS, N_CHILDREN, N_OTHER = 4, 40, 6  # children of each parent; unrelated features
D_MODEL = N_PARENTS * (1 + N_CHILDREN) + N_OTHER
PARENT_STRENGTH = 2.0
FIRST_OTHER = D_MODEL - N_OTHER


def child_number(parent: Any, child: Any) -> Any:
    """The feature (and the direction: the standard basis) of a child, or of many."""
    return N_PARENTS + parent * N_CHILDREN + child


def planted_rows(n: int, seed: int, *, noise: float = 0.01, childless: float = 0.2) -> Rows:
    """Rows x = 2 parent + child + an unrelated feature + noise; a share of them has the parent without a child."""
    generator = np.random.default_rng(seed)
    parent = generator.integers(N_PARENTS, size=n)
    child = generator.integers(N_CHILDREN, size=n)
    without = generator.random(n) < childless
    features = np.zeros((n, D_MODEL), dtype=bool)
    features[np.arange(n), parent] = True
    features[np.arange(n), child_number(parent, child)] = ~without
    features[np.arange(n), FIRST_OTHER + generator.integers(N_OTHER, size=n)] = True
    x = features.astype(np.float32)
    x[:, :N_PARENTS] *= PARENT_STRENGTH
    x += noise * generator.standard_normal(x.shape).astype(np.float32)
    everywhere = np.ones(n, dtype=bool)
    return Rows(
        x=torch.from_numpy(x),
        attributes={"letter": parent, "noun": np.where(without, -1, parent * N_CHILDREN + child)},
        positions={"noun": everywhere, EVERYWHERE: everywhere},
        features=features,
    )


def planted_language(n: int = 4000, family: str = "same_token", **how: float) -> Language:
    """Three corpora of the planted world; the shifted one differs by its seed only."""
    return Language(
        fit=planted_rows(n, 1, **how),
        test=planted_rows(n, 2, **how),
        shifted=planted_rows(n, 3, **how),
        even=planted_rows(n, 4, **how),
        relations=(Relation(family, "letter", "noun", "noun"),),
        tasks=(ProbeTask("letter", "letter", "noun"),),
        value_names={
            "letter": [f"L{p}" for p in range(N_PARENTS)],
            "noun": [f"L{p}n{c}" for p in range(N_PARENTS) for c in range(N_CHILDREN)],
        },
        feature_names=[
            *(f"letter L{p}" for p in range(N_PARENTS)),
            *(f"noun L{p}n{c}" for p in range(N_PARENTS) for c in range(N_CHILDREN)),
            *(f"other {i}" for i in range(N_OTHER)),
        ],
        seed=0,
    )


def turned_language(n: int = 4000) -> Language:
    """Fit and test text that disagree about all but dimension 0, which is the label (a letter) in both.

    Dimension 1 is the label on fit text (nine times of ten) and its opposite on test text; dimension 2 is noise on fit
    text and the label on test text. The shifted text is like the fit text.
    """

    def rows(seed: int, turned: bool) -> Rows:
        generator = np.random.default_rng(seed)
        label = generator.integers(2, size=n)
        mostly, noise = label ^ (generator.random(n) < 0.1), generator.integers(2, size=n)
        pair = (1 - mostly, label) if turned else (mostly, noise)
        x = np.stack([label, *pair], axis=1).astype(np.float32)
        everywhere = np.ones(n, dtype=bool)
        return Rows(
            x=torch.from_numpy(x),
            attributes={"letter": label, "noun": label},
            positions={"noun": everywhere, EVERYWHERE: everywhere},
            features=x > 0,
        )

    return Language(
        fit=rows(1, False),
        test=rows(2, True),
        shifted=rows(3, False),
        even=rows(4, False),
        relations=(Relation("same_token", "letter", "noun", "noun"),),
        tasks=(ProbeTask("letter", "letter", "noun"),),
        value_names={"letter": ["no", "yes"], "noun": ["no", "yes"]},
        feature_names=["label", "A", "B"],
        seed=0,
    )


def turned_sae() -> SparseAutoencoder:
    """Latent 0 reads dimension 1 of the turned text (right on fit text), latent 1 dimension 2 (right on test text)."""
    sae = SparseAutoencoder(3, 2, Threshold())
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3)[1:].T)
        sae.W_dec.copy_(torch.eye(3)[1:])
        sae.threshold = torch.tensor(0.5)
    return sae


def planted_sae(n_absorbed: int) -> SparseAutoencoder:
    """One latent per feature; the first `n_absorbed` children of every parent silence it and carry its direction."""
    sae = SparseAutoencoder(D_MODEL, D_MODEL, Threshold())
    encoder, decoder = torch.eye(D_MODEL), torch.eye(D_MODEL)
    for parent in range(N_PARENTS):
        for child in range(n_absorbed):
            number = child_number(parent, child)
            encoder[number, parent] = -2 * PARENT_STRENGTH
            decoder[number, parent] = PARENT_STRENGTH
    with torch.no_grad():
        sae.W_enc.copy_(encoder)
        sae.W_dec.copy_(decoder)
        sae.threshold = torch.tensor(0.5)
    return sae


def random_sae(d_sae: int = 128, seed: int = 0) -> SparseAutoencoder:
    """Gaussian weights; its threshold keeps about three of a hundred latents."""
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(D_MODEL, d_sae, Threshold())
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(d_sae, D_MODEL, generator=generator), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.threshold = torch.tensor(0.5)
    return sae


def subject_of(dictionary, language: Language, name: str = "planted") -> Subject:
    """A subject whose held-out rows are the test text."""
    bench = Bench(calibration=language.fit, clean=language.test, language=language)
    return Subject(name=name, dictionary=dictionary, raw=dictionary, bench=bench, held_out=language.test)


def subject_of_sae(sae: SparseAutoencoder, language: Language) -> Subject:
    """The same for an SAE."""
    return subject_of(Learned(sae=sae), language)


def write_run(
    folder: Path,
    cache: ActivationCache,
    sae: SparseAutoencoder,
    *,
    seed: int = 0,
    masked: float = 0.0,
    corrupt: str = "",
    variant: str = "masked",
    arch: str = "batchtopk",
    k: int = 3,
    recipe: str = "",
    **changes: object,
) -> Path:
    """A finished run of `sae` on the first hook point of a cache, as python -m train leaves it."""
    plan, hook = cache.plan, cache.plan.hooks[0]
    recipe = recipe or corrupt.replace("=", " ") or (f"{variant} {masked}" if masked else "unmasked")
    size = f" d{sae.d_sae}" if sae.d_sae != 16 else ""
    name = f"{arch} {recipe}{size} seed{seed}".replace(" ", "_")
    (folder / name).mkdir(parents=True)
    facts = {
        "name": name,
        "recipe": recipe,
        "config": {
            "arch": arch,
            "d_sae": sae.d_sae,
            "k": k,
            "seed": seed,
            "masked_fraction": masked,
            "corrupt": corrupt,
        },
        "data": {"hook": hook.name, "masked_variant": variant},
        "cache": {
            "path": str(cache.path),
            "cache_id": plan.cache_id,
            "hook": hook.name,
            "hook_point": hook.hook_point,
            "tl_name": hook.tl_name,
            "hf_name": hook.hf_name,
            "model": plan.model["id"],
            "dataset": plan.source["id"],
            "window_tokens": plan.window_tokens,
            "prepend_bos": True,
        },
        "norm_factor": 1.0,
    }
    finish_run(folder / name, sae, {**facts, **changes})
    return folder / name


def small_cache(folder: Path, *, seed: int = 0) -> ActivationCache:
    """A made-up cache of 192 held-out rows of 6 dimensions, of a model that nobody has, with a masked variant."""
    plan = make_plan(n_rows=256, n_train_rows=64, seed=seed)
    create_cache(folder, plan)
    for shard in range(plan.n_shards):
        values, columns = make_shard(plan, shard)
        columns["flags"] = np.ones(plan.rows_in(shard), dtype=np.uint8)
        write_shard(folder, plan, shard, values, columns)
    finalize_cache(folder)
    return ActivationCache.open(folder)


def small_sae(seed: int, d_model: int = 6, d_sae: int = 16) -> SparseAutoencoder:
    """Random weights and a threshold, for any cache."""
    sae = SparseAutoencoder(d_model, d_sae, Threshold())
    initialise(sae, seed, entries="normal", norm=1.0)
    sae.threshold = torch.tensor(0.1)
    return sae


def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model but the embedded one, which comes with the checkout, can be had."""
    had = load_model

    def unreachable(name: str, **options: Any) -> Any:
        if name != "tiny":
            raise UserError(f"'{name}' cannot be had")
        return had(name, **options)

    monkeypatch.setattr("evaluate.bench.load_model", unreachable)


def write_four_runs(folder: Path, cache: ActivationCache) -> Path:
    """Two seeds, masked and not."""
    for seed in range(2):
        for masked in (0.0, 0.5):
            write_run(folder, cache, small_sae(seed + 10 * (masked > 0)), seed=seed, masked=masked)
    return folder


def subject_of_tasks(dictionary: Dictionary, *tasks: ProbeData, seed: int = 0) -> Subject:
    """A subject with probe tasks alone; the test rows of the first are its held-out rows."""
    rows = tasks[0].test.source
    bench = Bench(calibration=rows, clean=rows, tasks=tasks)
    return Subject(name="it", dictionary=dictionary, raw=dictionary, bench=bench, held_out=rows, seed=seed)
