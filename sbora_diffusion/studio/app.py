"""The studio: a page for everything that the command line does, for people who never open a terminal."""

import ipaddress
import logging
import os
import threading
from collections.abc import Sequence
from functools import partial

import gradio as gr

from sbora_diffusion.studio.generate_tab import generate_tab, renewed
from sbora_diffusion.studio.jobs import Jobs
from sbora_diffusion.studio.measure_tab import measurable, measure_tab
from sbora_diffusion.studio.merge_tab import merge_tab, mergeable
from sbora_diffusion.studio.regions_fields import renewed_regions
from sbora_diffusion.studio.regions_tab import regions_tab
from sbora_diffusion.studio.session import Folders, Workshop
from sbora_diffusion.studio.style import CSS, theme
from sbora_diffusion.studio.train_tab import teachable, train_tab
from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)

MAX_UPLOAD = "20mb"  # of one file
TITLE = "# SBoRA studio\nTeach a model things from a handful of images, and put them together exactly."


def build_ui(workshop: Workshop, jobs: Jobs) -> gr.Blocks:
    """The page, not yet served."""
    with gr.Blocks(title="SBoRA studio", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(TITLE, elem_id="title")
        with gr.Tabs():
            with gr.Tab("Generate", id="generate") as first:
                concepts, base = generate_tab(workshop)
            with gr.Tab("Regions", id="regions") as boxes:
                regional = regions_tab(workshop)
            with gr.Tab("Train", id="train") as second:
                source, train_base = train_tab(workshop, jobs)
            with gr.Tab("Merge", id="merge") as third:
                picked, ledger = merge_tab(workshop)
            with gr.Tab("Measure", id="measure-tab") as fourth:
                measured = measure_tab(workshop, jobs)
        renewals = (
            (first, partial(renewed, workshop), [base, concepts], [concepts, base]),
            (boxes, partial(renewed_regions, workshop), regional[1:], regional),
            (second, partial(teachable, workshop), None, [source, train_base]),
            (third, partial(mergeable, workshop), picked, [picked, ledger]),
            (fourth, partial(measurable, workshop), measured[0], list(measured)),
        )
        for tab, renew, inputs, outputs in renewals:
            gr.on([page.load, tab.select], renew, inputs, outputs, queue=False, show_progress="hidden")
    return page


def serve(workshop: Workshop, jobs: Jobs, host: str, port: int | None, *, open_browser: bool) -> str:
    """Serve the page from threads of this process; its address.

    Args:
        port: the first free one from 7860 on if None.

    Raises:
        SboraError: the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is sent anywhere
    warn_of(host)
    threading.Thread(target=workshop.warm_up, daemon=True).start()
    page = build_ui(workshop, jobs).queue(default_concurrency_limit=4)
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
        SboraError: a studio runs in this folder already, or something else on the port.
    """
    folders = Folders()
    jobs = Jobs(folders.runs)
    workshop = Workshop(folders, tuple(bases), jobs.is_running)
    try:
        address = serve(workshop, jobs, host, port, open_browser=open_browser)
        log.info("the studio is at %s; Ctrl-C ends it, trainings go on", address)
        threading.Event().wait()
    finally:
        jobs.close()


def warn_of(host: str) -> None:
    """Say what it means to be reachable from elsewhere."""
    if not is_loopback(host):
        log.warning("whoever reaches %s can use this studio, and fill the disk: there is no password", host)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
