"""From parameters to a proven ONNX artifact; numpy and onnx, no torch."""
