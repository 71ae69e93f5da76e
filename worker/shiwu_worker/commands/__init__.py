"""Commands of `shiwu-worker` that end by themselves: --check, --tune, --fetch-model, --convert, and generated docs."""
