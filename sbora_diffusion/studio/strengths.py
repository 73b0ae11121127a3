"""A slider for the strength of each concept that is on."""

from collections.abc import Mapping

import gradio as gr


def strength_slider(name: str, factors: Mapping[str, float], strengths: gr.State) -> None:
    """One for a concept, to be called while the page is drawn; `strengths` holds name -> strength of those moved."""
    slider = gr.Slider(
        0, 1.5, factors.get(name, 1.0), step=0.05, label=f"Strength of {name}", min_width=140, interactive=True
    )
    slider.change(
        lambda value, all_factors: {**all_factors, name: value}, [slider, strengths], strengths, queue=False
    )  # fmt: skip
