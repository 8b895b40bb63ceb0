"""The engines the end-to-end benches compare, each behind the same few methods."""
