"""Pictures of data, views, predictions and features."""
