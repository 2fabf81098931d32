"""What stops an export."""


class ExportError(ValueError):
    """The model cannot be exported as asked; one line that says what is wrong and what to do."""
