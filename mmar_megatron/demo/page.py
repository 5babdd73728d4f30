"""The page, in gradio: what stands where, and which of the studio's work a button starts. It fetches nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import gradio as gr
import uvicorn
from fastapi import FastAPI
from PIL import Image

from mmar_megatron.demo import easel
from mmar_megatron.demo.canvas import Canvas
from mmar_megatron.demo.studio import Studio
from mmar_megatron.diffusion.painting import GuidanceSchedule, Order
from mmar_megatron.diffusion.sampler import SamplerKind
from mmar_megatron.generation.painting import settle
from mmar_megatron.generation.reading import Reading

# Progress as gradio shows it would lie over the picture.
_IN_THE_QUEUE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_WITH_THE_MODEL: dict[str, Any] = {**_IN_THE_QUEUE, "concurrency_id": "model", "concurrency_limit": 1}
"""One at a time, of all of these."""
_AT_ONCE: dict[str, Any] = {**_IN_THE_QUEUE, "queue": False}
"""Of what cannot fail: without the queue there is no message."""
_SEEDS = 2**31
_LARGEST_UPLOAD = "64mb"
_EXAMPLE = "a large red circle at the top left, on a white background"
_CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: auto; }
.status { min-height: 1.5em; text-align: center; font-variant-numeric: tabular-nums; }
.facts { color: var(--body-text-color-subdued); }
.pictures img { image-rendering: pixelated; }
"""


def serve(studio: Studio, *, listening: socket.socket) -> None:
    """Serves the page until the process is told to stop."""
    app = gr.mount_gradio_app(
        FastAPI(),
        build(studio),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=_LARGEST_UPLOAD,
        theme=_theme(),
        css=_CSS,
    )
    try:
        _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run(sockets=[listening])
    finally:
        studio.end()


def _theme() -> gr.themes.Base:
    """Gradio's, with fonts of the reader's machine, and small print that can be read."""
    theme = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )


class _Server(uvicorn.Server):
    """An open page holds a connection for as long as it is open: that these are cut at the end is no error to tell of."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


def build(studio: Studio) -> gr.Blocks:
    """The page of a model."""
    with gr.Blocks(title="MMAR", analytics_enabled=False) as page:
        gr.Markdown(f"### MMAR\n{_facts(studio)}", elem_classes="facts")
        with gr.Tabs():
            with gr.Tab("Paint", id="paint"):
                read_it, canvas, status = _paint_tab(studio)
            with gr.Tab("Read", id="read", elem_id="reading"):
                pictures = _read_tab(studio)
        outputs = {"pictures": pictures, "status": status}
        handed = read_it.click(_handler(partial(_to_read, studio), outputs), [canvas], [*outputs.values()], **_IN_THE_QUEUE)
        # By the tab's own button: an update of the tabs from here sets what is in them back, also what was just typed.
        handed.success(None, js="() => { document.getElementById('reading-button').click(); }", **_AT_ONCE)
    return page.queue()


def _facts(studio: Studio) -> str:
    opened, (rows, columns) = studio.opened, studio.grid
    size = opened.processor.codec["image_size"]
    step = f", step {opened.facts['step']:,}" if "step" in opened.facts else ""
    where = f"{opened.facts['dtype']} on {opened.model.device.type}"
    return f"`{opened.facts['model']}`{step}; pictures of {size} x {size} pixels, {rows} x {columns} tokens; {where}"


def _paint_tab(studio: Studio) -> tuple[gr.Button, gr.State, gr.Markdown]:
    """Gives what the other tab is reached by: its button, the picture, and the line for what is wrong with it."""
    canvas, stop = gr.State(studio.blank()), gr.State(None)
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            prompt = gr.Textbox(label="Prompt", placeholder=_EXAMPLE, lines=2, max_lines=4, elem_id="prompt")
            with gr.Row():
                paint = gr.Button("Paint", variant="primary", min_width=80, elem_id="paint")
                redraw = gr.Button("Redraw", min_width=80, elem_id="redraw")
                halt = gr.Button("Stop", variant="stop", min_width=80, interactive=False, elem_id="stop")
            settings = _settings(studio)
            seed, another = settings.pop("seed"), settings.pop("another_seed")
        with gr.Column(scale=5, min_width=320):
            picture = _easel(studio)
            status = gr.Markdown(
                "Draw over the picture with the mouse to mark what is to change.", elem_classes="status", elem_id="status"
            )
            with gr.Row():
                open_it = gr.UploadButton("Open a picture", size="sm", file_types=["image"], elem_id="open")
                read_it = gr.Button("Read this picture", size="sm", elem_id="read-it")

    opened = {"canvas": canvas, "picture": picture, "status": status}
    outputs = {**opened, "stop": stop, "seed": seed, "paint": paint, "redraw": redraw, "halt": halt}
    inputs = [prompt, seed, another, canvas, picture, *settings.values()]

    def work(
        text: str, number: int | None, new: bool, shown: Canvas, marked: list[int], *values: Any, change: bool
    ) -> Iterator[dict[str, Any]]:
        asked = {
            "prompt": text,
            "seed": secrets.randbelow(_SEEDS) if new else number,
            "settings": dict(zip(settings, values, strict=True)),
            **({"start": shown, "marked": marked} if change else {}),
        }
        return _painted(studio, asked)

    def idle() -> list[Any]:
        return [gr.Button(interactive=True), gr.Button(interactive=True), gr.Button(interactive=False)]

    for triggers, change in (([paint.click, prompt.submit], False), ([redraw.click], True)):
        run = _handler(partial(work, change=change), outputs)
        painting = gr.on(triggers, run, inputs, [*outputs.values()], **_WITH_THE_MODEL)
        painting.then(idle, None, [paint, redraw, halt], **_AT_ONCE)
    halt.click(lambda event: event and event.set(), [stop], None, **_AT_ONCE)
    open_it.upload(_handler(partial(_open, studio), opened), [open_it], [*opened.values()], **_WITH_THE_MODEL)
    return read_it, canvas, status


def _easel(studio: Studio) -> gr.HTML:
    return gr.HTML(
        [],
        html_template=easel.HTML,
        css_template=easel.CSS,
        js_on_load=easel.SCRIPT,
        apply_default_css=False,
        picture=_url(studio.png(studio.blank())),
        rows=studio.grid[0],
        columns=studio.grid[1],
        file="picture.png",
        elem_id="picture",
    )


def _settings(studio: Studio) -> dict[str, Any]:
    """What is asked beside the prompt, by the names of `settle`, with `seed` and `another_seed`."""
    usual = settle(studio.opened)
    tokens = studio.opened.model.config.num_image_tokens
    found: dict[str, Any] = {}
    found["guidance_scale"] = gr.Slider(
        1, 10, usual["guidance_scale"], step=0.1, label="Guidance scale", info="Exaggerates the prompt; 1: not at all"
    )
    with gr.Row():
        found["rounds"] = gr.Number(
            usual["rounds"], precision=0, min_width=120, label="Rounds", info=f"1 to {tokens}", elem_id="rounds"
        )
        found["seed"] = gr.Number(0, precision=0, min_width=120, label="Seed", info="The same paints the same", elem_id="seed")
    found["another_seed"] = gr.Checkbox(True, label="Another seed each time", elem_id="another-seed")
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        with gr.Row():
            found["steps"] = gr.Number(
                usual["steps"], precision=0, min_width=120, label="Steps", info="Of the head, for each token", elem_id="steps"
            )
            found["sampler"] = gr.Dropdown([*get_args(SamplerKind)], value=usual["sampler"], min_width=120, label="Sampler")
        with gr.Row():
            found["order"] = gr.Radio([*get_args(Order)], value=usual["order"], min_width=120, label="Order of tokens")
            found["guidance_schedule"] = gr.Radio(
                [*get_args(GuidanceSchedule)], value=usual["guidance_schedule"], min_width=120, label="Guidance schedule"
            )
        found["temperature"] = gr.Slider(
            0, 2, usual["temperature"], step=0.05, label="Temperature", info="Scales the noise: below 1 less variety"
        )
        found["refresh_every"] = gr.Number(
            usual["refresh_every"],
            precision=0,
            label="Refresh every",
            info="Rounds after which the backbone runs over the whole picture again; 1 is exact, more is faster",
        )
    return found


def _painted(studio: Studio, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What changes on the page, round by round."""
    stop = threading.Event()
    for number, shown in enumerate(studio.paint(**asked, stop=stop)):
        updates: dict[str, Any] = {"canvas": shown.canvas, "status": shown.status}
        if shown.png is not None:
            # Marks are taken off at first; those that are drawn meanwhile stay.
            unmarked: dict[str, Any] = {"value": []} if number == 0 else {}
            updates["picture"] = gr.HTML(picture=_url(shown.png), file=f"seed-{asked['seed']}.png", **unmarked)
        if number == 0:
            updates |= {"stop": stop, "seed": asked["seed"], "paint": gr.Button(interactive=False)}
            updates |= {"redraw": gr.Button(interactive=False), "halt": gr.Button(interactive=True)}
        yield updates


def _open(studio: Studio, file: str) -> Iterator[dict[str, Any]]:
    canvas = studio.open_picture(Path(file))
    shown = gr.HTML(value=[], picture=_url(studio.png(canvas)), file=html.escape(Path(file).name))
    yield {"canvas": canvas, "picture": shown, "status": "Mark with the mouse what is to change, and redraw it."}


def _to_read(studio: Studio, canvas: Canvas) -> Iterator[dict[str, Any]]:
    canvas.check_whole()
    yield {"pictures": [Image.open(io.BytesIO(studio.png(canvas)))]}


def _read_tab(studio: Studio) -> gr.Gallery:
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            pictures = gr.Gallery(
                label="Pictures",
                type="filepath",
                format="png",
                interactive=True,
                columns=2,
                fit_columns=False,
                object_fit="contain",
                elem_classes="pictures",
                elem_id="pictures",
            )
        with gr.Column(scale=4, min_width=320):
            question = gr.Textbox(label="Question", placeholder="empty: a plain caption", lines=2, elem_id="question")
            read = gr.Button("Read", variant="primary", elem_id="read")
            answer = gr.Textbox(label="Answer", lines=4, interactive=False, buttons=["copy"], elem_id="answer")
            status = gr.Markdown("One picture or several, with one question.", elem_classes="status", elem_id="read-status")
            settings = _reading_settings()

    outputs = {"answer": answer, "status": status}

    def work(found: list[tuple[str, Any]] | None, asked: str, *values: Any) -> Iterator[dict[str, Any]]:
        yield {"status": "reading"}
        begin = time.monotonic()
        files = [Path(file) for file, _ in found or []]
        text = studio.read(files, question=asked, settings=dict(zip(settings, values, strict=True)))
        yield {"answer": text, "status": f"read in {time.monotonic() - begin:.1f} s"}

    inputs = [pictures, question, *settings.values()]
    gr.on([read.click, question.submit], _handler(work, outputs), inputs, [*outputs.values()], **_WITH_THE_MODEL)
    return pictures


def _reading_settings() -> dict[str, Any]:
    """By the names of `Reading`."""
    usual = Reading()
    found: dict[str, Any] = {}
    with gr.Accordion("Advanced", open=False, elem_id="reading-advanced"):
        with gr.Row():
            found["max_tokens"] = gr.Number(usual.max_tokens, precision=0, min_width=120, label="Most tokens", elem_id="most")
            found["seed"] = gr.Number(usual.seed, precision=0, min_width=120, label="Seed")
        found["temperature"] = gr.Slider(
            0, 2, usual.temperature, step=0.05, label="Temperature", info="0: the most likely word after word"
        )
        found["top_p"] = gr.Slider(
            0.05, 1, usual.top_p, step=0.05, label="Top p", info="Draw from the most likely words of this probability"
        )
    return found


def _url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _handler(work: Callable[..., Iterator[dict[str, Any]]], outputs: dict[str, Any]) -> Callable[..., Iterator[list[Any]]]:
    """For an event: the work's updates by name in the order of the outputs; mistakes as a message, and in the status line."""

    def run(*values: Any) -> Iterator[list[Any]]:
        try:
            for updates in work(*values):
                yield [updates.get(name, gr.skip()) for name in outputs]
        except (ValueError, FloatingPointError) as error:
            message = html.escape(str(error))  # which is shown as HTML
            yield [message if name == "status" else gr.skip() for name in outputs]
            raise gr.Error(message, print_exception=False) from error

    return run
