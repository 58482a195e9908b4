"""COCO numbers of finished runs, and the report that compares them."""
