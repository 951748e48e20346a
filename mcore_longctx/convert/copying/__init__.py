"""Plans carried out: ranges copied, cast, blended and quantised by several processes, with a journal."""
