"""Helpers to look into matplotlib figures of images."""

import random

import numpy as np
import torch
from matplotlib.patches import Rectangle


def words(figure):
    """Return all text of a figure."""
    texts = [text for axes in figure.axes for text in (*axes.texts, axes.title, axes.xaxis.label)]
    legends = [text for legend in figure.legends for text in legend.get_texts()]
    title = [figure._suptitle] if figure._suptitle else []
    return [text.get_text().strip("\u200b") for text in (*title, *texts, *legends) if text.get_text()]


def rectangles(axes):
    """Return the boxes on an image as x0, y0, x1, y1."""
    patches = [patch for patch in axes.patches if type(patch) is Rectangle]
    return [(*p.get_xy(), p.get_xy()[0] + p.get_width(), p.get_xy()[1] + p.get_height()) for p in patches]


def pixels_of(axes):
    return np.asarray(axes.images[0].get_array())


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
