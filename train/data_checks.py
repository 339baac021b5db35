"""What a loader is asked for, compared with what there is, before it reads anything."""

from cache_spec.cache import ActivationCache
from cache_spec.errors import CacheError, UserError
from cache_spec.plan import HookPlan
from train.config import POSITIONS, TARGETS, DataConfig


def target_hook_of(cache: ActivationCache, data: DataConfig, hook: HookPlan) -> HookPlan:
    """The hook point to reconstruct: the input's own, or another that the cache has."""
    if not data.target_hook:
        return hook
    target = cache.hook(data.target_hook)
    if target.name == hook.name:
        others = [each.name for each in cache.plan.hooks if each.name != hook.name]
        raise UserError(
            f"--target-hook {data.target_hook} is the input's own hook point; leave it out for a plain SAE"
            + (f", or name one of {', '.join(others)}" if others else "")
        )
    return target


def check_variant(cache: ActivationCache, data: DataConfig, with_masked: bool) -> None:
    """Refuses a masked variant that the cache lacks, if anything depends on it."""
    if data.masked_variant == "clean":
        raise UserError("--masked-variant clean is the unmasked one; name another, or ask for no masked rows")
    if with_masked or data.positions != "all" or data.masked_variant != DataConfig.masked_variant:
        try:
            cache.variant(data.masked_variant)
        except CacheError as error:
            raise CacheError(
                f"{error}; name another with --masked-variant, or harvest a cache with it (without one, "
                "--masked-fraction is 0 and --positions all)"
            ) from None


def check_options(data: DataConfig) -> None:
    for option, value, known in (("positions", data.positions, POSITIONS), ("target", data.target, TARGETS)):
        if value not in known:
            raise UserError(f"--{option} {value} is unknown; it is one of {', '.join(known)}")
    if data.batch_size < 1 or data.n_tokens < data.batch_size:
        raise UserError(f"--tokens {data.n_tokens:,} is less than one batch of {data.batch_size:,}")
    for option, value in (("read-ahead", data.read_ahead), ("readers", data.readers)):
        if value < 1:
            raise UserError(f"--{option} {value} is not positive")
