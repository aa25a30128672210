def judged(mistake, names):
    return "?" if names else "none"
