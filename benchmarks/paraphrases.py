"""Prompts for `encoders.py`: by label, in words that no caption of the data set has. Written before the first run."""

PARAPHRASES = {
    "eurosat": {
        "AnnualCrop": ["wheat fields", "maize and barley", "ploughed farmland", "cereal farming", "harvested corn"],
        "Forest": ["woods", "a woodland of tall trees", "pine trees", "dense jungle", "oaks and firs"],
        "HerbaceousVegetation": ["shrubs", "wild plants and weeds", "bushes", "heath and scrub", "tall grasses"],
        "Highway": ["a motorway", "a road with cars", "an expressway", "asphalt lanes", "a freeway junction"],
        "Industrial": ["factories and warehouses", "a manufacturing plant", "storage halls", "a refinery", "a factory"],
        "Pasture": ["cattle grazing", "a meadow with cows", "grassland for sheep", "hay meadows", "a ranch"],
        "PermanentCrop": ["vineyards", "orchards", "olive groves", "rows of apple trees", "a fruit plantation"],
        "Residential": ["houses", "a suburb with homes", "apartments in a town", "villas with gardens", "a village"],
        "River": ["a stream", "a creek in a valley", "a canal", "a brook", "the Danube"],
        "SeaLake": ["the ocean", "a pond", "open water", "a lagoon", "a reservoir"],
    },
    "flowers": {
        "dandelion": ["dandelions", "blowballs", "a taraxacum", "a yellow weed with fluffy seeds", "puffballs"],
        "daisy": ["daisies", "chamomile", "a marguerite", "white petals", "an oxeye"],
        "roses": ["a rose", "a bouquet for valentine", "a rosebush with thorns", "red and romantic", "rosebuds"],
        "sunflowers": ["sunflowers", "helianthus", "a tall bloom with black seeds", "a field in summer with oil seeds",
                       "Van Gogh"],
        "tulips": ["a tulip", "bulbs in spring", "Holland", "Dutch gardens", "a field in the Netherlands"],
    },
}  # fmt: skip
