"""The page: what is drawn, above four tabs that draw it."""

from typing import Any

import gradio as gr

from ddim.studio.compare_tab import compare_tab
from ddim.studio.desk import Desk
from ddim.studio.doctor_tab import doctor_tab
from ddim.studio.draw_tab import draw_tab
from ddim.studio.latent_tab import latent_tab
from ddim.studio.parts import QUIET, fit_bar, make_bar
from ddim.studio.shelf import Shelf

__all__ = ["CSS", "NAMES", "build_page", "theme"]

CSS = """
.gradio-container { width: min(1180px, 100%) !important; max-width: 1180px !important;
  margin: 0 auto !important; }
.pictures { display: flex; flex-wrap: wrap; gap: 12px; }
figure { margin: 0; display: inline-block; max-width: 100%; }
figure img { display: block; border-radius: 4px; max-width: 100%; height: auto; }
figure img.pixels { image-rendering: pixelated; }
figcaption { font-size: 0.85rem; text-align: center; padding-top: 2px; }
.status { font-size: 1rem; min-height: 2.4rem; }
.status progress { display: block; width: 100%; height: 10px; margin-top: 8px; }
.notes { margin: 0 0 8px 18px; font-size: 0.9rem; list-style: disc; }
p.error { border-left: 4px solid #b91c1c; padding: 8px 12px; margin: 0 0 8px; }
p.about { margin: 0; font-size: 0.9rem; }
p.verdict { font-size: 1.15rem; font-weight: 600; margin: 0 0 8px; }
.sheet { overflow-x: auto; }
.sheet table { border-collapse: separate; border-spacing: 6px; }
.sheet caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
.sheet table, .sheet th, .sheet td { border: none !important; }
.sheet th { font-weight: 500; text-align: left; padding: 0 6px; max-width: 220px; }
.sheet thead th { text-align: center; }
.sheet td { vertical-align: top; max-width: 200px; font-size: 0.85rem; }
.sheet .empty { display: block; width: 112px; height: 112px; border-radius: 4px;
  border: 1px dashed currentColor; opacity: 0.35; }
#draw-python textarea, #draw-command textarea, .code textarea { font-family: monospace; }
footer { display: none !important; }
"""


NAMES = """() => {
  const text = (node) => (node ? node.textContent.trim().replace(/\\s+/g, ' ') : '');
  const name = (node, words) => {
    if (words && node.getAttribute('aria-label') !== words) node.setAttribute('aria-label', words);
  };
  const all = () => {
    document.querySelectorAll('button.upload-container').forEach((node) => {
      const label = text(node.closest('.block')?.querySelector('[data-testid="block-label"]'));
      name(node, label ? label + ': ' + text(node) : text(node));
    });
    document.querySelectorAll('.block textarea').forEach((node) => {
      name(node, text(node.closest('.block').querySelector('[data-testid="block-info"]')));
    });
  };
  new MutationObserver(all).observe(document.body, { childList: true, subtree: true });
  all();
}"""
"""Names what gradio leaves without a name that says what it is: where files are dropped, and texts
beside a button to copy them."""


def theme() -> Any:
    """The look of the page, with the fonts of the visitor's own machine."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    blue, grey = gr.themes.colors.blue, gr.themes.colors.gray
    made = gr.themes.Default(primary_hue=blue, neutral_hue=grey, font=sans, font_mono=mono)
    # Darker than gradio's own, so that words are read by those who see little contrast.
    return made.set(
        color_accent="*primary_700",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
    )


def build_page(desk: Desk, shelf: Shelf, *, device: str) -> Any:
    """The page of a desk and a shelf."""
    with gr.Blocks(title="ddim studio", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML("<h1>ddim studio</h1>", elem_id="title")
        bar = make_bar(desk, shelf)
        with gr.Tabs():
            with gr.Tab("Draw", id="draw"):
                draw_tab(desk, shelf, bar, device=device)
            with gr.Tab("Compare", id="compare"):
                compare_tab(desk, shelf, bar, device=device)
            with gr.Tab("Latent space", id="latent"):
                latent_tab(desk, shelf, bar, device=device)
            with gr.Tab("Doctor", id="doctor"):
                doctor_tab(desk, shelf, bar, device=device)

        def fit(name: str) -> tuple[Any, ...]:
            return fit_bar(desk, shelf, name)

        told = [bar.prompt, bar.class_, bar.guidance, bar.about]
        page.load(lambda: gr.update(choices=shelf.names()), None, bar.model, **QUIET)
        page.load(fit, bar.model, told, **QUIET)
        bar.model.change(fit, bar.model, told, **QUIET)

        def leave(visit: gr.Request) -> None:
            desk.stop(str(visit.session_hash))

        page.unload(leave)
    page.queue(max_size=64, default_concurrency_limit=16, api_open=False)
    return page
