"""Images of data, views, predictions and features."""
