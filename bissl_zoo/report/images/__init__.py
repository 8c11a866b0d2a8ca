"""Figures of data, views, predictions and features."""
