"""A small server for those who try an export: requests wait in a queue, one thread draws them, a page shows them."""
