"""A page where a person drops an X-ray: is it like the films that the model knows, what does the model say, and why?

    python space/app.py [--model folder-or-hub-id] [--port 7860]

Research software, not a medical device. The page makes no request to elsewhere, keeps nothing that it was given, and
runs as a Hub Space without change (space/README.md). Needs the extra `demo`: pip install 'cxr-backbone[demo]'.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from film_card import CSS, Answer, refused_as_html
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.utils import logging as transformers_logging

from cxr_backbone.data.radiographs import MAX_FILE_BYTES, read_radiograph
from cxr_backbone.data.synthetic import draw_phantom
from cxr_backbone.evaluation.saliency import grad_cam
from cxr_backbone.guard import guarded_pipeline

SHIPPED = "checkpoints/cxr-inception"
STATEMENT = "**Research software, not a medical device. It must not be used to diagnose or to treat anybody.**"
MOST_FILMS = 10  # at once
MOST_SECONDS = 600  # that an upload may take
DRAWN = {"A drawing of clear lungs": False, "A drawing with an opacity": True}
# A browser refuses the page whatever is from elsewhere. (Gradio's own code needs the two that are called unsafe.)
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
LAUNCH: dict[str, Any] = {
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": CSS,
    "footer_links": ["api"],
    "run_history": False,  # Gradio would keep each call, with its film, in the browser
    "ssr_mode": False,
    "max_file_size": MAX_FILE_BYTES,
}

logger = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=shipped_model(), help="folder or Hub id (default: the shipped checkpoint)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    try:
        reader = FilmReader(given.model)
    except (ValueError, OSError) as error:
        sys.exit(f"--model {given.model}: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # leaves by the `with`, which takes the folder along
    with tempfile.TemporaryDirectory(prefix="cxr-space-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # where a film lies from its upload until it is read
        app_kwargs: dict[str, Any] = {"middleware": [(StayHere, (), {})]}
        page(reader).launch(server_port=given.port, app_kwargs=app_kwargs, **LAUNCH)


def shipped_model() -> str:
    """The checkpoint of the repository, or of the Space that it was copied into."""
    here = Path(__file__).resolve().parent
    return next((str(place / SHIPPED) for place in (here, here.parent) if (place / SHIPPED).is_dir()), SHIPPED)


class FilmReader:
    """A model with its guard, asked as `guarded_pipeline` asks it.

    Args:
        source: a folder, or a repository of the Hub.

    Raises:
        ValueError: the model has no guard, or a damaged one.
        OSError: there is no such model, or the Hub can't be reached.
    """

    def __init__(self, source: str):
        self.classify: Any = guarded_pipeline(source)  # (typed for other pictures than arrays)

    def __call__(self, pixels: np.ndarray) -> Answer:
        """What the model says of a film (height, width), uint8."""
        model, image_processor = self.classify.model, self.classify.image_processor
        scores = self.classify(pixels, top_k=None)
        seen = image_processor(pixels, do_rescale=False, do_normalize=False).pixel_values[0][0]
        pixel_values = image_processor(pixels, return_tensors="pt").pixel_values
        # The answer is explained, or, where no place speaks for it, the next one.
        maps = (
            (score["label"], grad_cam(model, pixel_values, [model.config.label2id[score["label"]]])[0])
            for score in scores
        )
        explained, places = next(((label, places) for label, places in maps if places.any()), (None, None))
        return Answer(scores, model.config, seen, explained, places)


def page(reader: FilmReader) -> gr.Blocks:
    drawings = {name: draw_phantom(seed=0, opacity=opacity) for name, opacity in DRAWN.items()}

    def look(paths: list[str] | None) -> Iterator[tuple[None, str]]:
        """The films one after the other, as each is ready. The list of files is emptied."""
        paths, cards = paths or [], []
        for path in paths[:MOST_FILMS]:
            try:
                cards.append(reader(read_and_forget(path)).as_html(Path(path).name))
            except Exception as error:
                cards.append(refused_as_html(Path(path).name, sentence(error)))
            yield None, "".join(cards)
        for path in paths[MOST_FILMS:]:
            Path(path).unlink()
            cards.append(refused_as_html(Path(path).name, f"Not looked at: the page takes {MOST_FILMS} films at once."))
        yield None, "".join(cards)

    def classify(path: str | None) -> dict[str, Any]:
        try:
            if path is None:
                raise ValueError("No film was given.")
            return reader(read_and_forget(path)).as_json()
        except Exception as error:
            raise gr.Error(sentence(error), print_exception=False) from None

    with gr.Blocks(title="cxr-backbone", analytics_enabled=False) as blocks:
        gr.Markdown(f"# What does the model say of a chest X-ray?\n{STATEMENT}")
        films = gr.File(label="Films: JPEG, PNG, TIFF or DICOM, ten at most", file_count="multiple", elem_id="films")
        with gr.Row():
            examples = {name: gr.Button(name, size="sm") for name in drawings}
        slider = gr.Slider(0, 100, 50, step=5, label="Strength of the overlay, %", elem_id="overlay")
        answers = gr.HTML(elem_id="answers")
        films.upload(look, films, [films, answers], api_visibility="private")
        for name, button in examples.items():
            button.click(
                lambda name=name: reader(drawings[name]).as_html(f"{name} (not an X-ray)"),
                None,
                answers,
                api_visibility="private",
            )
        fade = "value => document.documentElement.style.setProperty('--overlay', value / 100)"
        slider.change(None, slider, None, js=fade, api_visibility="private")

        film, answer = gr.File(visible=False), gr.JSON(visible=False)
        gr.Button(visible=False).click(classify, film, answer, api_name="classify")
    return blocks


def read_and_forget(path: str) -> np.ndarray:
    """A film that was uploaded, after which it is no longer on disk; nor is what is left of uploads that broke off."""
    try:
        return read_radiograph(path, name=Path(path).name)
    finally:
        Path(path).unlink()
        for file in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*"):
            if file.is_file() and time.time() - file.stat().st_mtime > MOST_SECONDS:
                file.unlink(missing_ok=True)


def sentence(error: Exception) -> str:
    """What a person is told. What nobody foresaw is logged by its kind alone, since a film's header may be quoted."""
    if isinstance(error, ValueError | ImportError):
        return str(error)
    logger.error("A film could not be answered: %s", type(error).__name__)
    return f"This film could not be answered ({type(error).__name__})."


class StayHere:
    """Middleware: tells the browser to load nothing from elsewhere."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await self.app(scope, receive, send_with_policy)


if __name__ == "__main__":
    main()
