"""Images, labels and captions to train on and to measure against."""
