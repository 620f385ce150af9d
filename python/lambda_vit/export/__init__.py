"""Files that run without this library: ONNX, `torch.export` and AOTInductor."""
