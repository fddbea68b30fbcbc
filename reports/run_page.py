"""The report of a run: one self-contained page with curves, samples, config, and what the sinks do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import run_lib
from config_lib import key_docs, written
from corpus.tokenizer import Tokenizer, UnknownCharacters
from reports.compare import RunRecord, comparable, read_runs, result_of
from reports.html import Block, Fold, Heading, Picture, Verbatim, html_page
from reports.plots import plot_all_maps, plot_map, plot_series, plot_shares, plot_shares_over_training
from reports.sinks import TOKENS, Measured, attention_maps, described, read_measured, token_name
from reports.summary import parameters
from runtime.errors import one_line
from runtime.files import read_json, write_text
from runtime.screen.text import Table, duration, human
from training.optimizer import GROUPS
from transformer.config import TransformerConfig
from transformer.model import Transformer

_MAP_TOKENS = 48  # of the text whose attention is shown
_LABELLED_TOKENS = 32  # of the maps with labelled tokens
_MOST_MAPS = 8  # layers to draw, and heads of each
_MOST_SAMPLES = 12


def write_after_training(run: run_lib.Run, warn: Callable[[str], None]) -> None:
    """`write_report` at the end of a run, which must not fail because of a page: an error becomes one warning."""
    try:
        write_report(run.workdir, run.model, run.tokenizer, f"step {run.step}", warn)
    except Exception as error:  # the run is saved; the report command raises the same error again
        path = run.workdir / run_lib.REPORT_FILE
        warn(f"{path}: not written: {one_line(error)}; python main.py report --workdir={run.workdir}")


def write_report(
    workdir: Path,
    model: Transformer | str,
    tokenizer: Tokenizer,
    which: str,
    warn: Callable[[str], None],
    text: str | None = None,
) -> Path:
    """Write `report.html` from the files of a run, and from its model. Returns the page's path.

    The model is on one device, or a string that says why there is none; `which` names its state. Shown is the attention
    in `text`, by default in the last sample's beginning. Raises UserError if a file of the run cannot be read,
    UnknownCharacters if the tokenizer lacks some of `text`, StorageError if the page cannot be written.
    """
    run, saved = read_runs([workdir], warn)[0], read_json(workdir / run_lib.CONFIG_FILE)
    model_config = run_lib.model_config_for(run_lib.read_config(workdir), tokenizer)
    samples = run_lib.read_samples(workdir)
    measured = read_measured(workdir / run_lib.SINKS_FILE, model_config, warn)
    blocks = [
        _summary(run, model_config),
        *_curves(comparable([run], "val_loss")[0][0]),
        *_sinks(model_config, measured, tokenizer),
        *_attention(model, tokenizer, which, _text_to_show(text, samples, run, tokenizer)),
        *_samples(samples),
        *_config(run),
        _environment(saved),
    ]
    write_text(workdir / run_lib.REPORT_FILE, html_page(run.name, blocks))
    return workdir / run_lib.REPORT_FILE


def _text_to_show(text: str | None, samples: list[tuple[int, str]], run: RunRecord, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of the text whose attention is shown."""
    if text is not None:
        return tokenizer.encode(text)
    for found in (samples[-1][1].lstrip() if samples else "", run.config["sample_prompt"]):
        try:
            ids = tokenizer.encode(found)
        except UnknownCharacters:
            continue
        if len(ids) > 1:
            return ids
    return np.zeros(0, np.int32)


# --- Sections ---------------------------------------------------------------------------------------------------------


def _summary(run: RunRecord, model_config: TransformerConfig) -> Table:
    last = run.evaluations[-1] if run.evaluations else {}
    result = result_of(comparable([run], "val_loss")[0][0], "val_loss", None)
    known = lambda key, written: None if result[key] is None else written(result[key])
    loss = "{:.4f}".format
    rows = {
        "validation loss": loss(last["val_loss"]) if last else None,
        "best": known("best", lambda best: f"{loss(best)} at step {result['best_step']:,.0f}"),
        "best, averaged weights": known("averaged", loss),
        "bits per byte": known("bits_per_byte", loss),
        "steps": known("steps", "{:,.0f}".format),
        "tokens": known("tokens", human),
        "time, without compilation": known("seconds", duration),
        "tokens per second": known("tokens_per_second", human),
        "peak memory": known("peak_mib", "{:,.0f} MiB".format),
        "parameters": parameters(model_config),
        "model": f"{model_config.num_blocks} layers of {model_config.num_heads} heads, width "
        f"{model_config.embedding_dim}, context {model_config.context_len}",
        "text": f"{run.config['dataset']}, {run.config['tokenizer']}",
    }
    return Table("", ["", ""], [[name, value] for name, value in rows.items() if value is not None], left=2)


def _curves(run: RunRecord) -> list[Block]:
    losses = {"loss": "training", "val_loss": "validation", "ema_val_loss": "averaged weights"}
    wanted = [
        (losses, "loss, nats per token", False),
        ({"grad_norm": "gradient norm"}, "gradient norm before clipping", True),
        ({group.rate: group.title for group in reversed(GROUPS.values())}, "learning rates", False),
        ({"tokens_per_second": "tokens per second"}, "tokens per second", False),
    ]
    pictures = [
        Picture(png, f"{title}, by step", clear=True)
        for keys, title, log in wanted
        if (png := plot_series(run.rows, keys, title, log)) is not None
    ]
    return [Heading("Curves"), pictures] if pictures else ["No step was logged."]


def _sinks(model_config: TransformerConfig, measured: dict[int, Measured], tokenizer: Tokenizer) -> list[Block]:
    blocks: list[Block] = [Heading("Sinks")]
    if not model_config.has_sinks:
        blocks.append("This model has no attention sinks (attention_sink = none).")
    if not measured:
        return [*blocks, "No shares were measured in this run: it has no evaluation with report = True."]
    steps, last = list(measured), list(measured.values())[-1]
    pictures, shown = [], {"the sinks": "shares"} if model_config.has_sinks else {}
    if np.isfinite(last.where).all():  # an older build measured shares alone
        table, sentences = described(last, tokenizer)
        blocks, shown = [*blocks, *sentences, table], {**shown, "the first token": "first"}
    for of, name in shown.items():
        shares_ELN = np.array([getattr(each, name) for each in measured.values()])
        most, least = (
            f"{word} in head {head + 1} of layer {layer + 1} ({shares_ELN[-1, layer, head]:.1%})"
            for word, (layer, head) in _extremes(shares_ELN[-1]).items()
        )
        said = f"At step {steps[-1]:,} {shares_ELN[-1].mean():.1%} of all attention goes to {of}; {most}, {least}."
        blocks.append(said)
        pictures.append(Picture(plot_shares(shares_ELN[-1], of), f"Attention to {of} by head: {said}", clear=True))
        if len(steps) > 1:
            over = plot_shares_over_training(steps, shares_ELN, of)
            pictures.append(Picture(over, f"Attention to {of} by layer and head over training", clear=True))
    about = f"Means over up to {TOKENS:,} tokens of the validation text, always the same."
    return [*blocks, f"What a head gives to its sink, it gives to no token. {about}", pictures]


def _extremes(shares_LN: np.ndarray) -> dict[str, Any]:
    """Layer and head of the largest share, and of the smallest."""
    picks = {"most": np.argmax, "least": np.argmin}
    return {word: np.unravel_index(pick(shares_LN), shares_LN.shape) for word, pick in picks.items()}


def _attention(model: Transformer | str, tokenizer: Tokenizer, which: str, ids: np.ndarray) -> list[Block]:
    """Attention maps of one text, and what each of its tokens gives to the sinks."""
    heading = Heading("What the heads attend to")
    if isinstance(model, str):
        return [heading, f"No attention map: {model}."]
    ids = ids[: min(_MAP_TOKENS, model.config.context_len)]
    if len(ids) < 2:
        return [heading, 'No text to show it on; name one: python main.py report --workdir=RUN --text="..."']
    sinks = model.config.has_sinks
    maps_LNTS = np.asarray(attention_maps(model, jnp.asarray(ids)), np.float64)
    shares_LNT = maps_LNTS[..., 0]
    shares_LN = shares_LNT.mean(-1)
    parts = [tokenizer.decode_bytes([token]).decode("utf-8", "replace") for token in ids.tolist()]  # spaces too
    labels = [token_name(tokenizer, token) for token in ids.tolist()]
    L, N = shares_LN.shape
    layers, heads = _spread(L, _MOST_MAPS), _spread(N, _MOST_MAPS)
    said = (
        f"The model at {which}, on a text of {len(ids)} tokens. Rows are queries, from top to bottom; the stronger the "
        "colour, the higher the probability (its square root is drawn)."
    )
    pictures = [Picture(plot_all_maps(maps_LNTS, layers, heads, sinks), "Attention maps of the heads", clear=True)]
    T = min(_LABELLED_TOKENS, len(ids))
    for word, (layer, head) in _extremes(shares_LN).items() if sinks else [("", (L - 1, 0))]:
        share = f": {shares_LN[layer, head]:.1%} to its sink, {word}" if word else ""
        title = f"layer {layer + 1}, head {head + 1}{share}"
        png = plot_map(maps_LNTS[layer, head, :T, : 1 + T], labels[:T], title, sinks)
        pictures.append(Picture(png, f"Attention map of {title}", clear=True))
    blocks: list[Block] = [heading, said, pictures]
    if sinks:
        blocks.append("Each token by how much of its attention goes to the sinks, mean over a layer's heads.")
        for layer in layers:
            shades = shares_LNT[layer].mean(0)
            caption = f"layer {layer + 1}: {shades.mean():.1%}, at most {shades.max():.1%}"
            blocks.append(Verbatim(caption, parts, (shades / max(shades.max(), 1e-9)).tolist()))
    return blocks


def _samples(samples: list[tuple[int, str]]) -> list[Block]:
    if not samples:
        return []
    shown = [samples[i] for i in _spread(len(samples), _MOST_SAMPLES)]
    *earlier, last = [Verbatim(f"step {step:,}", [text]) for step, text in shown]
    fold = [Fold(f"{len(earlier)} earlier", earlier)] if earlier else []
    return [Heading("Samples" if earlier else "Sample"), last, *fold]


def _config(run: RunRecord) -> list[Block]:
    docs = key_docs()
    texts = {key: (written(run.config[key]), written(doc.default)) for key, doc in docs.items()}
    rows = [[key, here, usual] for key, (here, usual) in texts.items() if here != usual]
    every = [[key, texts[key][0], doc.comment] for key, doc in docs.items()]
    bold = frozenset(i for i, (here, usual) in enumerate(texts.values()) if here != usual)
    return [
        Table("Config: what differs from the defaults", ["key", "here", "default"], rows, left=3),
        Fold("Every key", [Table("", ["key", "here", "meaning"], every, left=3, bold=bold)]),
    ]


def _environment(saved: dict[str, Any]) -> Table:
    rest = {key: value for key, value in saved.items() if key != "config"}
    packages = rest.pop("packages", {})
    rows = {**rest, **(packages if isinstance(packages, dict) else {})}
    known = [[key.replace("_", " "), str(value)] for key, value in rows.items() if value is not None]
    return Table("Environment", ["", ""], known, left=2)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spread, the first and last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})
