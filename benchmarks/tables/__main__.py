from benchmarks.tables.pages import PAGES, render

for path in PAGES:
    path.write_text(render(path.read_text()))
