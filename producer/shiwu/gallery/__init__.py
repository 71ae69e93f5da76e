"""One self-contained HTML page from answers: `shiwu gallery`. Needs the extra `gallery` (jinja2).

Front door: `page`, `thumbnails`, `answer_lines`.
"""
