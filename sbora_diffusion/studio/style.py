"""The look of the page: system fonts (nothing is fetched), large images, light and dark."""

from gradio.themes import Base, Soft

CSS = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto !important; }
.gradio-container .tabs, .gradio-container .tabitem { width: 100%; }
#title h1 { font-size: 1.35rem; font-weight: 650; margin: .2rem 0 0; letter-spacing: -.01em; }
#title p { color: var(--body-text-color-subdued); margin: .1rem 0 .4rem; }
.pixels img { image-rendering: pixelated; }
.results { min-height: 340px; }
.pixels .grid-wrap { max-height: none; height: auto; overflow: visible; }
.results .error, .note .error { display: none; }
.compact { align-items: flex-end !important; }
.token { align-self: center; }
.note, .note p { color: var(--body-text-color-subdued); font-size: .9rem; }
.strengths { gap: .4rem; }
.token button, button.token { font-family: var(--font-mono); }
.ledger { display: flex; height: 2.1rem; border-radius: .5rem; overflow: hidden; background: var(--neutral-200); }
.dark .ledger { background: var(--neutral-700); }
.ledger span { display: block; overflow: hidden; white-space: nowrap; font-size: .75rem; line-height: 2.1rem;
  text-align: center; color: #fff; border-right: 1px solid var(--body-background-fill); }
.ledger .free { background: none; color: var(--body-text-color-subdued); border: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .5rem 0; font-size: .85rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .4em; }
.faded { opacity: .35; }
.facts { margin: .5rem 0; padding: 0; list-style: none; font-size: .92rem; }
.facts li { margin: .25rem 0; }
.bar { height: .6rem; border-radius: .3rem; background: var(--neutral-200); overflow: hidden; margin: .35rem 0; }
.dark .bar { background: var(--neutral-700); }
.bar div { height: 100%; background: var(--primary-500); transition: width .4s; }
.job { margin: 0 0 .8rem; }
.job b { margin-right: .5rem; }
.job .why { color: var(--error-text-color, #b91c1c); }
.tab-container button { padding: 0 clamp(.2rem, 1.3vw, 1rem) !important;
  font-size: clamp(.8rem, 2.6vw, 1rem) !important; }
.fillable { padding: clamp(.5rem, 2vw, 1.5rem) !important; }
footer { display: none !important; }
:focus-visible { outline: 3px solid var(--primary-400) !important; outline-offset: 1px; }
"""


def theme() -> Base:
    """Return the theme: soft shapes and the fonts of the system."""
    return Soft(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Consolas", "monospace"],
        radius_size="md",
    ).set(
        block_title_background_fill="none",
        block_title_background_fill_dark="none",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_text_weight="600",
        block_title_padding="0",
        block_label_background_fill="none",
        block_label_text_color="*body_text_color",
    )
