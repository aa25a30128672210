"""The tests of llama_layers."""
