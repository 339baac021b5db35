"""Where everything is: paths, addresses, sizes, and the Zarr documents that say the same to any Zarr reader."""

from typing import Any

import numpy as np

from cache_spec.files import crc32c
from cache_spec.plan import HookPlan, Plan, VariantPlan

INTERNAL = "_granary"  # a plain folder, no Zarr group
ROOT = "zarr.json"
PLAN = f"{INTERNAL}/plan.json"
MANIFEST = f"{INTERNAL}/manifest.json"
RECORDS = f"{INTERNAL}/shards"
LOCK = f"{INTERNAL}/lock"
UPLOADS = f"{INTERNAL}/uploads"  # in a store: shards that were put and are not committed yet; publish.py
CLAIMS = f"{INTERNAL}/claims"  # who makes which shard, while some are missing; advice, no part of the cache
HARVESTING, PARTIAL_STATUS, COMPLETE = "harvesting", "partial", "complete"

ACTIVATION = np.dtype("<f2")
FP16_MAX = 65504.0
MOMENT = np.dtype("<f8")
MOMENTS = ("mean", "m2")  # per shard: the mean of its ordinary rows, and the sum of squared deviations from it
ARCHIVE = "archive"  # the profile of a cache whose activations are compressed
CHECKSUM_BYTES = 4
_ABSENT = np.uint64(2**64 - 1)  # how the index marks an inner chunk that the file does not hold
_COLUMNS = {"token": "<u4", "doc": "<u4", "window": "<u4", "pos": "<u2", "flags": "|u1", "mask": "|u1"}
FLAG_VALID, FLAG_BOS, FLAG_SPECIAL, FLAG_PAD = 1, 2, 4, 8  # bits of the column `flags`


def column_types(plan: Plan) -> dict[str, np.dtype]:
    """The row-aligned columns and their types: the fixed ones and `token_<variant>` for each variant but clean."""
    tokens = {f"token_{variant.name}": "<u4" for variant in plan.variants[1:]}
    return {name: np.dtype(kind) for name, kind in {**_COLUMNS, **tokens}.items()}


def column_fill(dtype: np.dtype) -> int:
    """What a row that was never written holds: the largest number of the type, never a plausible 0."""
    return int(np.iinfo(dtype).max)


def activation_array(hook: str, variant: str) -> str:
    """The Zarr array of one hook point and variant."""
    return f"{hook}/{variant}"


def activation_file(hook: str, variant: str, shard: int) -> str:
    """The file that holds one shard of it."""
    return f"{activation_array(hook, variant)}/c/{shard}/0"


def activation_files(plan: Plan, shard: int) -> dict[str, tuple[HookPlan, VariantPlan]]:
    """Every activation file of one shard, and what it holds."""
    return {
        activation_file(hook.name, variant.name, shard): (hook, variant)
        for hook in plan.hooks
        for variant in plan.variants
    }


def moment_array(hook: str, variant: str, moment: str) -> str:
    """The Zarr array of one of the MOMENTS of one hook point and variant, (n_shards, d_model)."""
    return f"{activation_array(hook, variant)}_{moment}"


def moment_file(hook: str, variant: str, moment: str, shard: int) -> str:
    """The file that holds one shard's row of it."""
    return f"{moment_array(hook, variant, moment)}/c/{shard}/0"


def moment_files(plan: Plan, shard: int) -> dict[str, HookPlan]:
    """Every file of moments of one shard, with its hook point; none in a cache of format 1.0."""
    return {
        moment_file(hook.name, variant.name, moment, shard): hook
        for hook in plan.hooks
        for variant in plan.variants
        for moment in (MOMENTS if plan.has_moments else ())
    }


def column_file(name: str, shard: int) -> str:
    """The file that holds one shard of a column."""
    return f"rows/{name}/c/{shard}"


def record_file(shard: int) -> str:
    """The commit record of a shard: the only sign that the shard is whole."""
    return f"{RECORDS}/{shard:06d}.json"


def shard_files(plan: Plan, shard: int) -> dict[str, int]:
    """Every file of one shard and its size in bytes (in an archive its activation files are smaller)."""
    sizes = {
        file: activation_file_bytes(plan, hook, shard) for file, (hook, _) in activation_files(plan, shard).items()
    }
    for name, dtype in column_types(plan).items():
        sizes[column_file(name, shard)] = plan.shard_rows * dtype.itemsize + CHECKSUM_BYTES
    for file, hook in moment_files(plan, shard).items():
        sizes[file] = hook.d_model * MOMENT.itemsize + CHECKSUM_BYTES
    return sizes


def planner_files(plan: Plan) -> dict[str, str]:
    """Arrays that the planner left beside the plan, and the SHA-256 of each file, which is in `source`."""
    sums = {f"{INTERNAL}/{name}.npy": plan.source.get(f"{name}_sha256") for name in ("windows", "window_docs")}
    return {file: checksum for file, checksum in sums.items() if isinstance(checksum, str)}


def cache_bytes(plan: Plan) -> int:
    """Bytes of all shard files of the whole cache (metadata adds a few kilobytes a shard)."""
    full = sum(shard_files(plan, 0).values()) * (plan.n_shards - 1)
    return full + sum(shard_files(plan, plan.n_shards - 1).values())


def chunks_in(plan: Plan, shard: int) -> int:
    """Inner chunks that an activation file holds; the last is padded to full size with NaN rows."""
    return -(-plan.rows_in(shard) // plan.chunk_rows)


def chunk_bytes(plan: Plan, hook: HookPlan) -> int:
    """Bytes of one inner chunk [chunk_rows, d_model]."""
    return plan.chunk_rows * hook.d_model * ACTIVATION.itemsize


def tail_bytes(plan: Plan) -> int:
    """Bytes after the rows: the index of inner chunks and its CRC."""
    return 16 * (plan.shard_rows // plan.chunk_rows) + CHECKSUM_BYTES


def activation_file_bytes(plan: Plan, hook: HookPlan, shard: int) -> int:
    """Size of an activation file."""
    return chunks_in(plan, shard) * chunk_bytes(plan, hook) + tail_bytes(plan)


def shard_index(plan: Plan, lengths: list[int]) -> bytes:
    """The end of an activation file whose inner chunks have these lengths and follow each other from byte 0.

    (offset, bytes) of each inner chunk as u8 LE, absent ones 2^64-1, then the CRC of that.
    """
    index = np.full((plan.shard_rows // plan.chunk_rows, 2), _ABSENT, "<u8")
    index[: len(lengths), 0] = np.cumsum([0, *lengths[:-1]])
    index[: len(lengths), 1] = lengths
    data = index.tobytes()
    return data + checksum_bytes(crc32c(data))


def plain_index(plan: Plan, hook: HookPlan, shard: int) -> bytes:
    """The end of an activation file that is not compressed."""
    return shard_index(plan, [chunk_bytes(plan, hook)] * chunks_in(plan, shard))


def checksum_bytes(checksum: int) -> bytes:
    """A checksum as Zarr's codec crc32c puts it after the data."""
    return checksum.to_bytes(CHECKSUM_BYTES, "little")


def activation_attributes(plan: Plan, hook: HookPlan, level: int = 0) -> dict[str, Any]:
    """Attributes of an activation array; xarray applies `scale_factor` by itself, plain Zarr does not."""
    row_bytes = hook.d_model * ACTIVATION.itemsize
    mmap = {"offset": 0, "row_bytes": row_bytes, "rows_per_file": plan.shard_rows, "tail_bytes": tail_bytes(plan)}
    return {"scale_factor": hook.scale_factor, "granary": {"profile": ARCHIVE} if level else {"mmap": mmap}}


def blosc_settings(level: int) -> dict[str, Any]:
    """How an archive compresses an inner chunk: zstd over the bits of its fp16 values, like with like."""
    return {"typesize": ACTIVATION.itemsize, "cname": "zstd", "clevel": level, "shuffle": "bitshuffle", "blocksize": 0}


def zarr_documents(plan: Plan, level: int = 0) -> dict[str, dict[str, Any]]:
    """The Zarr v3 document of every group and array below the root, by its path. They never change.

    `level` is the compression of an archive, 1 to 9; 0 is a cache to work with.
    """
    documents: dict[str, dict[str, Any]] = {}
    for hook in plan.hooks:
        names = {"hook_point": hook.hook_point, "tl_name": hook.tl_name, "hf_name": hook.hf_name}
        documents[hook.name] = _group({"granary": names})
        for variant in plan.variants:
            documents[activation_array(hook.name, variant.name)] = _activation_document(plan, hook, level)
            for moment in MOMENTS if plan.has_moments else ():
                documents[moment_array(hook.name, variant.name, moment)] = _moment_document(plan, hook)
    documents["rows"] = _group({})
    for name, dtype in column_types(plan).items():
        documents[f"rows/{name}"] = _column_document(plan, dtype)
    return documents


def archive_level(granary: dict[str, Any]) -> int:
    """The compression that the root's attributes tell of; 0 for a cache to work with."""
    return granary["level"] if granary.get("profile") == ARCHIVE else 0


def root_document(granary: dict[str, Any], plan: Plan | None) -> dict[str, Any]:
    """The root group. With a plan it repeats all documents below it, so that one read opens the cache."""
    root = _group({"granary": granary})
    if plan is not None:
        root["consolidated_metadata"] = _consolidated(zarr_documents(plan, archive_level(granary)))
    return root


def _consolidated(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """In the form that zarr-python writes: each group inside carries an empty one of its own."""
    empty = {"kind": "inline", "must_understand": False, "metadata": {}}
    filled = {
        path: {**document, "consolidated_metadata": empty} if document["node_type"] == "group" else document
        for path, document in documents.items()
    }
    return {"kind": "inline", "must_understand": False, "metadata": filled}


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"attributes": attributes, "zarr_format": 3, "node_type": "group"}


def _bytes_codec(dtype: np.dtype) -> dict[str, Any]:
    return {"name": "bytes"} if dtype.itemsize == 1 else {"name": "bytes", "configuration": {"endian": "little"}}


def _activation_document(plan: Plan, hook: HookPlan, level: int) -> dict[str, Any]:
    packed = [{"name": "blosc", "configuration": blosc_settings(level)}, {"name": "crc32c"}] if level else []
    sharding = {
        "chunk_shape": [plan.chunk_rows, hook.d_model],
        "codecs": [_bytes_codec(ACTIVATION), *packed],
        "index_codecs": [_bytes_codec(ACTIVATION), {"name": "crc32c"}],
        "index_location": "end",
    }
    return _array(
        shape=[plan.n_rows, hook.d_model],
        dtype=ACTIVATION,
        chunk=[plan.shard_rows, hook.d_model],
        fill="NaN",
        codecs=[{"name": "sharding_indexed", "configuration": sharding}],
        attributes=activation_attributes(plan, hook, level),
        dimensions=["row", "feature"],
    )


def _moment_document(plan: Plan, hook: HookPlan) -> dict[str, Any]:
    return _array(
        shape=[plan.n_shards, hook.d_model],
        dtype=MOMENT,
        chunk=[1, hook.d_model],
        fill="NaN",
        codecs=[_bytes_codec(MOMENT), {"name": "crc32c"}],
        attributes={},
        dimensions=["shard", "feature"],
    )


def _column_document(plan: Plan, dtype: np.dtype) -> dict[str, Any]:
    return _array(
        shape=[plan.n_rows],
        dtype=dtype,
        chunk=[plan.shard_rows],
        fill=column_fill(dtype),
        codecs=[_bytes_codec(dtype), {"name": "crc32c"}],
        attributes={},
        dimensions=["row"],
    )


def _array(
    *,
    shape: list[int],
    dtype: np.dtype,
    chunk: list[int],
    fill: str | int,
    codecs: list[dict[str, Any]],
    attributes: dict[str, Any],
    dimensions: list[str],
) -> dict[str, Any]:
    return {
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": codecs,
        "attributes": attributes,
        "dimension_names": dimensions,
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
