"""A program as one ONNX file, compared with torch before it appears."""
