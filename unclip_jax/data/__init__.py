"""Data sets written by TFDS as ArrayRecord, and the pipeline that reads them by random access."""
