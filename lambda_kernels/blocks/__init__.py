"""Descriptions of timm's blocks, and the modules that replace them."""
