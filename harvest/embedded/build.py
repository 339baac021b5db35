"""Makes the embedded model's folder: trains, measures, and writes weights, tokenizer and card as one whole.

    python -m harvest.embedded.build

Deterministic: the same machine and number of threads give the same weights bit for bit. Another machine rounds
differently; the loss then differs by less than 0.02.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import GPTNeoXForCausalLM

from cache_spec.command import run_command
from cache_spec.errors import UserError
from harvest.embedded import training
from harvest.embedded.card import CARD, Facts, render
from harvest.embedded.folder import FOLDER
from harvest.embedded.measure import measure
from harvest.embedded.tokenizer import new_tokenizer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def build(out: Path, *, n_steps: int, n_documents: int, n_test_documents: int, seed: int) -> Facts:
    """Train a model and write its folder. Raises UserError for sizes that cannot work or a folder that is not ours."""
    if n_steps < 1 or n_documents < training.BATCH_DOCUMENTS or n_test_documents < 100:
        raise UserError(
            f"{n_steps} steps on {n_documents} documents with {n_test_documents} for testing cannot work; use at least "
            f"1 step, {training.BATCH_DOCUMENTS} documents and 100 for testing"
        )
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something that is not a model; choose a new folder or one made by this command")
    model = training.new_model(seed)
    training.train(model, training.training_tokens(n_documents, seed), n_steps, seed)
    in_distribution, shifted = measure(model, n_test_documents, seed)
    parameters = list(model.parameters())
    facts = Facts(
        n_parameters=sum(p.numel() for p in parameters),
        n_trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        n_layers=training.N_LAYERS,
        d_model=training.D_MODEL,
        n_steps=n_steps,
        n_training_documents=n_documents,
        n_test_documents=n_test_documents,
        seed=seed,
        in_distribution=in_distribution,
        shifted=shifted,
    )
    write_folder(out, model, facts)
    return facts


def write_folder(out: Path, model: GPTNeoXForCausalLM, facts: Facts) -> None:
    """Write everything beside `out`, then put it in place; a reader never sees half a model."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        whole, replaced = Path(scratch) / "new", Path(scratch) / "old"
        model.save_pretrained(whole)
        new_tokenizer().save_pretrained(whole)
        (whole / CARD).write_text(render(facts))
        if out.exists():
            out.rename(replaced)
        shutil.move(whole, out)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder to write; one made by this command is replaced.")] = FOLDER,
    steps: Annotated[int, typer.Option(help="Training steps of 64 documents.")] = 700,
    documents: Annotated[int, typer.Option(help="Training documents, half of each distribution.")] = 44_800,
    test_documents: Annotated[int, typer.Option(help="Documents of each distribution to measure on.")] = 2_000,
    seed: Annotated[int, typer.Option(help="Decides weights, documents and their order.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; another number rounds differently.")] = 1,
) -> None:
    """Train the embedded language model and write its folder: weights, tokenizer, model card."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        facts = build(out, n_steps=steps, n_documents=documents, n_test_documents=test_documents, seed=seed)
    finally:
        torch.set_num_threads(before)  # whoever called this in their own process rounds as before
    for name, numbers in (("in distribution", facts.in_distribution), ("shifted", facts.shifted)):
        print(f"{name}: loss {numbers.loss:.3f}, floor {numbers.floor:.3f}, spelling {numbers.spelling:.3f}")
    print(f"written: {out}")


if __name__ == "__main__":
    run_command(app)
