"""Charts of a run, drawn by matplotlib."""


def use_chinese_font() -> None:
    """Lets matplotlib draw Chinese by a font of this machine; where it has none there are boxes, without warnings."""
    import contextlib
    import warnings

    from matplotlib import font_manager, rcParams

    warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
    if len(rcParams["font.family"]) > 1:
        return
    files = font_manager.findSystemFonts()
    for file in sorted(files, key=lambda file: ("CJK" not in file, "Sans" not in file, "Regular" not in file, file)):
        with contextlib.suppress(RuntimeError, OSError):  # a font of pixels, or a broken one
            if font_manager.get_font(file).get_char_index(ord("的")):
                font_manager.fontManager.addfont(file)
                rcParams["font.family"] = ["DejaVu Sans", font_manager.FontProperties(fname=file).get_name()]
                return
