"""COCO metrics of finished training runs, and the report that compares them."""
