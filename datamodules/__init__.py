"""Images and captions: one reader for each layout on disk, one data module for all of them."""
