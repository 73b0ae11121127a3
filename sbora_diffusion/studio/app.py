"""The studio's page and its server."""

import ipaddress
import logging
import os
import threading
from collections.abc import Callable, Sequence

import gradio as gr

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

MAX_UPLOAD = "20mb"  # per file
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
    with gr.Blocks(title="SBoRA studio", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(TITLE, elem_id="title")
        refreshed = []
        with gr.Tabs():
            for name, build in tabs.items():
                with gr.Tab(name, id=name.lower()) as tab:
                    refreshed.append((tab, build()))
        for tab, refresh in refreshed:
            gr.on([page.load, tab.select], refresh.handler, refresh.inputs, refresh.outputs, **INSTANT)
    return page


def serve(session: Session, jobs: Jobs, host: str, port: int | None, *, open_browser: bool) -> str:
    """Serve the page from threads of this process; return its address.

    Args:
        port: None for the first free one from 7860 on.

    Raises:
        SboraError: the port is in use.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    warn_if_public(host)
    threading.Thread(target=session.warm_up, daemon=True).start()
    page = build_ui(session, jobs).queue(default_concurrency_limit=4)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            share=False,
            quiet=True,
            max_file_size=MAX_UPLOAD,
            theme=theme(),
            css=CSS,
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise SboraError(f"cannot serve on {host}, port {port or 'any'}: {error}", "Choose another --port.") from None
    return address


def open_studio(host: str, port: int | None, bases: Sequence[str], *, open_browser: bool) -> None:
    """Serve the studio of the current folder until Ctrl-C.

    Raises:
        SboraError: another studio is running in this folder, or the port is in use.
    """
    folders = Folders()
    jobs = Jobs(folders.runs)
    session = Session(folders, tuple(bases), jobs.is_running)
    try:
        address = serve(session, jobs, host, port, open_browser=open_browser)
        log.info("the studio is running at %s; press Ctrl-C to stop it (jobs continue)", address)
        threading.Event().wait()
    finally:
        jobs.close()


def warn_if_public(host: str) -> None:
    """Log a warning if other machines can reach the studio."""
    if not is_loopback(host):
        log.warning("the studio at %s has no password: anyone who can reach it can use it and fill the disk", host)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
