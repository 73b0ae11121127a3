"""The studio's page and its server."""

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.routes import App, ORJSONResponse

from sbora_diffusion.studio.door import Door, Guard
from sbora_diffusion.studio.evaluate_tab import evaluate_tab
from sbora_diffusion.studio.fields import INSTANT, Refresh
from sbora_diffusion.studio.generate_tab import generate_tab
from sbora_diffusion.studio.jobs import Jobs
from sbora_diffusion.studio.merge_tab import merge_tab
from sbora_diffusion.studio.regions_tab import regions_tab
from sbora_diffusion.studio.session import Folders, Session
from sbora_diffusion.studio.style import CSS, theme
from sbora_diffusion.studio.train_tab import train_tab
from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)

MAX_FILE = "20mb"  # of an upload
MAX_EVENTS = 32  # that wait, of all visitors
HOUR = 3600
TEMPORARY = ".studio.tmp"  # in the folder of runs
TITLE = "# SBoRA studio\nTrain concepts from a handful of images and combine them exactly."


def build_ui(session: Session, jobs: Jobs) -> gr.Blocks:
    """Build the page without serving it."""
    tabs: dict[str, Callable[[], Refresh]] = {
        "Generate": lambda: generate_tab(session),
        "Regions": lambda: regions_tab(session),
        "Train": lambda: train_tab(session, jobs),
        "Merge": lambda: merge_tab(session),
        "Evaluate": lambda: evaluate_tab(session, jobs),
    }
    cleaned = (HOUR, 24 * HOUR)  # how often shown and uploaded files are removed, and from what age
    with gr.Blocks(title="SBoRA studio", analytics_enabled=False, fill_width=True, delete_cache=cleaned) as page:
        gr.Markdown(TITLE, elem_id="title")
        refreshed = []
        with gr.Tabs():
            for name, build in tabs.items():
                with gr.Tab(name, id=name.lower()) as tab:
                    refreshed.append((tab, build()))
        for tab, refresh in refreshed:
            gr.on([page.load, tab.select], refresh.handler, refresh.inputs, refresh.outputs, **INSTANT)
    return page


class GuardedApp(App):
    """Gradio's server behind a door: what it refuses reaches none of the other middleware."""

    def __init__(self, door: Door, temporary: Path) -> None:
        super().__init__(default_response_class=ORJSONResponse)  # as `launch` makes it
        self._door, self._temporary = door, temporary

    def build_middleware_stack(self) -> Callable[..., Awaitable[None]]:
        """Put the guard outside of what Gradio adds."""
        return Guard(super().build_middleware_stack(), self._door, self._temporary)


def serve(
    session: Session, jobs: Jobs, door: Door, port: int | None, *, temporary: Path, open_browser: bool = False
) -> str:
    """Serve the page from threads of this process; return its address.

    Args:
        port: None for the first free one from 7860 on.
        temporary: the private folder from `temporary_folder`.

    Raises:
        SboraError: the port is in use.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    threading.Thread(target=session.warm_up, daemon=True).start()
    page = build_ui(session, jobs).queue(default_concurrency_limit=4, max_size=MAX_EVENTS)
    options: dict[str, Any] = {"theme": theme(), "css": CSS, "footer_links": [], "max_file_size": MAX_FILE}
    try:
        _, address, _ = page.launch(
            server_name=door.host,
            server_port=port,
            inbrowser=open_browser,
            share=False,
            quiet=True,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            num_workers=0,  # others would serve files past the door
            prevent_thread_lock=True,
            _app=GuardedApp(door, temporary),
            **options,
        )
    except OSError as error:
        raise SboraError(
            f"cannot serve on {door.host}, port {port or 'any'}: {error}", "Choose another --port."
        ) from None
    return address


def open_studio(door: Door, port: int | None, bases: Sequence[str], *, open_browser: bool) -> None:
    """Serve the studio of the current folder until Ctrl-C or SIGTERM.

    Raises:
        SboraError: another studio is running in this folder, or the port is in use.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that what follows the block below is done
    folders = Folders()
    jobs = Jobs(folders.runs)
    session = Session(folders, tuple(bases), jobs.is_running)
    try:
        with temporary_folder(folders.runs) as temporary:
            address = serve(session, jobs, door, port, temporary=temporary, open_browser=open_browser)
            log.info("the studio is running at %s; press Ctrl-C to stop it (jobs continue)", address)
            threading.Event().wait()
    finally:
        jobs.close()


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Give Gradio a folder that only this user can read, for the duration of a block; remove it at the end.

    The folder of a studio that was killed is removed first: only one at a time uses the folder of runs.
    """
    folder = parent.resolve() / TEMPORARY
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    before = tempfile.tempdir
    with _variable("GRADIO_TEMP_DIR", str(folder)):
        tempfile.tempdir = str(folder)  # uploads are received there
        try:
            yield folder
        finally:
            tempfile.tempdir = before
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
