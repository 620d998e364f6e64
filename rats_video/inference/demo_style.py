"""The demo page's style."""

CSS = """
.gradio-container { --body-text-color-subdued: #64748b; }
.dark .gradio-container { --body-text-color-subdued: #94a3b8; }
.gradio-container { max-width: 1040px !important; margin: 0 auto !important; padding: 0 !important; }
.gradio-container .fillable { padding: 8px 0 !important; }
.gradio-container main { padding: 16px !important; }
.html-container { padding: 0 !important; }
#heading h1 { font-size: 1.5rem; font-weight: 700; margin: 0 0 2px; }
#heading p { color: var(--body-text-color-subdued); margin: 0; }
#ask { align-items: end; }
#generate { min-height: 44px; }
#examples { gap: 6px; flex-wrap: wrap; }
#examples button {
  flex: 0 1 auto; width: max-content; min-width: 0; max-width: 100%; font-weight: 400; border-radius: 14px;
  padding: 4px 12px; white-space: normal; text-align: left;
}
#picture { font-size: 0.9rem; }
#picture label { display: inline-flex; flex-wrap: wrap; gap: 8px; align-items: center; }
#picture img { display: block; height: 96px; max-width: 100%; margin: 8px 0; border-radius: 8px; }
#picture button { text-decoration: underline; cursor: pointer; }
#knobs { align-items: start; }
#status { min-height: 2.6rem; }
#status p { margin: 0; }
#status .alert {
  color: #991b1b; background: #fee2e2; border-left: 4px solid #dc2626; border-radius: 6px; padding: 8px 12px;
}
.dark #status .alert { color: #fecaca; background: #450a0a; }
#clips { flex-wrap: wrap; align-items: stretch; }
#clips > * { flex: 1 1 300px; min-width: 0 !important; }
figure.clip {
  margin: 0; border: 1px solid var(--border-color-primary); border-radius: 12px; overflow: hidden;
  background: var(--block-background-fill);
}
figure.clip figcaption { display: flex; justify-content: space-between; padding: 8px 14px; font-weight: 600; }
figure.clip a { font-weight: 400; }
figure.clip video {
  display: block; width: min(100%, 60vh * var(--ratio)); aspect-ratio: var(--ratio); margin: 0 auto; object-fit: fill;
}
figure.clip p { margin: 0; padding: 8px 14px 0; color: var(--body-text-color-subdued); font-size: 0.85rem; }
figure.clip dl { display: flex; flex-wrap: wrap; gap: 4px 24px; margin: 0; padding: 10px 14px; }
figure.clip dl div { display: flex; flex-direction: column-reverse; }
figure.clip dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
figure.clip dt { color: var(--body-text-color-subdued); font-size: 0.85rem; }
:focus-visible { outline: 3px solid var(--primary-500) !important; outline-offset: 2px; }
"""
