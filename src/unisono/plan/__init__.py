"""Where each part is computed: decisions as data, made without processes."""
