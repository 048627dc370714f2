// Made by types.js from the server's OpenAPI document; not to be edited.

export type paths = Record<string, never>;
export type webhooks = Record<string, never>;
export interface components {
    schemas: {
        /**
         * SegmentationAnswer
         * @description A segmentation as JSON.
         */
        SegmentationAnswer: {
            /**
             * Request Id
             * @example 6f1d4cb1f0a84a0f9f0e6a9fbb7c3d1e
             */
            request_id: string;
            model: components["schemas"]["ModelId"];
            image: components["schemas"]["ImageSize"];
            /**
             * Threshold
             * @description lesion is where the probability is above it
             */
            threshold: number;
            /**
             * Clean
             * @description whether all but the largest region was left out
             */
            clean: boolean;
            mask: components["schemas"]["Mask"];
            lesion: components["schemas"]["LesionAnswer"];
            /** @description null where nothing is known of how good the network's masks are */
            quality: components["schemas"]["QualityAnswer"] | null;
            /** @description null where the network has no detector of other pictures */
            fitness: components["schemas"]["FitnessAnswer"] | null;
            /** @description if `borders` asks for them; null where nothing is known of the network's borders */
            borders?: components["schemas"]["Borders"] | null;
            /** @description if `features` asks for them; null if nothing was found */
            features?: components["schemas"]["FeaturesAnswer"] | null;
            /**
             * Timings Ms
             * @description milliseconds by stage; Server-Timing has the last stage too
             * @example {
             *       "decode": 2.9,
             *       "infer": 50.2,
             *       "queue": 0.1,
             *       "read": 0.4
             *     }
             */
            timings_ms: {
                [key: string]: number;
            };
        };
        /**
         * ModelId
         * @description The network that answered.
         */
        ModelId: {
            /**
             * Name
             * @example slsnet
             */
            name: string;
            /**
             * Version
             * @example 1.1.0
             */
            version: string;
            /**
             * Weights Sha256
             * @example 5f2c3d0e5f0f4e6bb4a7c9e1f7f0f1f4d1c5a3b2e8d7c6b5a4f3e2d1c0b9a8f7
             */
            weights_sha256: string;
            /**
             * Attention
             * @description form of the position attention at half resolution: `exact` compares all positions, `pooled` averages of keys and values
             * @example pooled
             */
            attention: string;
            /**
             * File Sha256
             * @description of the file that was loaded; the others are what it says of itself
             * @example 7bb66a195e36a16171a0e3da07af8b635f169986c705e9e7f4dcbef5f2b75db3
             */
            file_sha256: string;
        };
        /**
         * ImageSize
         * @description The photo's size, its EXIF orientation applied.
         */
        ImageSize: {
            /**
             * Width
             * @description pixels
             * @example 1024
             */
            width: number;
            /**
             * Height
             * @description pixels
             * @example 768
             */
            height: number;
            /**
             * Orientation
             * @description that was applied to the picture as it is stored, in EXIF's numbers, wherever the file has it: 1 for none
             * @example 1
             */
            orientation: number;
        };
        /**
         * Mask
         * @description The mask, in the one form that was asked for.
         */
        Mask: {
            format: components["schemas"]["MaskFormat"];
            /**
             * Width
             * @description pixels
             * @example 1024
             */
            width: number;
            /**
             * Height
             * @description pixels
             * @example 768
             */
            height: number;
            /**
             * Png
             * @description a 1-bit PNG, lesion white, in base64
             * @example iVBORw0KGgoAAAANSUhEU
             */
            png?: string | null;
            rle?: components["schemas"]["CocoRle"] | null;
            /**
             * Polygons
             * @description for each separate part its rings of [x, y], the outer one first, holes after it; in pixels of the mask, from its upper left corner
             * @example [
             *       [
             *         [
             *           412.5,
             *           300.25
             *         ],
             *         [
             *           530.75,
             *           310.5
             *         ],
             *         [
             *           470,
             *           402.25
             *         ]
             *       ]
             *     ]
             */
            polygons?: [
                number,
                number
            ][][][] | null;
            /**
             * Probabilities
             * @description the network's map: unsigned integers of 16 bits, the lower byte first, row by row, 65535 for 1; in base64. Up-sampled bilinearly, with half-pixel centres and clamped edges, as it is at the photo's size, it gives the mask of any threshold
             * @example AAABAAMA//8=
             */
            probabilities?: string | null;
            /**
             * Overlay
             * @description the photo with the outline drawn on it, at most 2048 pixels a side: a JPEG in base64
             * @example /9j/4AAQSkZJRgABAQ
             */
            overlay?: string | null;
            /**
             * Probability8
             * @description the map that `probabilities` has, as a greyscale PNG of 8 bits in base64
             * @example iVBORw0KGgoAAAANSUhEU
             */
            probability8?: string | null;
            /**
             * Probability16
             * @description the same with 16 bits
             * @example iVBORw0KGgoAAAANSUhEU
             */
            probability16?: string | null;
            /**
             * Npy
             * @description the same as a NumPy file, float32 [height, width], in base64
             * @example k05VTVBZAQB2AHsn
             */
            npy?: string | null;
            /**
             * Svg
             * @description the outlines that `polygons` has, as an SVG document
             * @example <svg xmlns="http://www.w3.org/2000/svg" width="1024" height="768">…</svg>
             */
            svg?: string | null;
            coco?: components["schemas"]["CocoAnnotation"] | null;
        };
        /**
         * MaskFormat
         * @description How a JSON answer holds the mask.
         * @enum {string}
         */
        MaskFormat: "png" | "rle" | "polygons" | "probabilities" | "overlay" | "probability8" | "probability16" | "npy" | "svg" | "coco";
        /**
         * CocoRle
         * @description COCO's compressed run-length encoding; `pycocotools.mask.decode` reads it.
         */
        CocoRle: {
            /**
             * Size
             * @description height, width
             * @example [
             *       768,
             *       1024
             *     ]
             */
            size: [
                number,
                number
            ];
            /**
             * Counts
             * @example Ygf21fg0O1O1N2N2N2N1O1O1O
             */
            counts: string;
        };
        /**
         * CocoAnnotation
         * @description The mask as an annotation of a COCO data set; the ids are to be changed.
         */
        CocoAnnotation: {
            /** Id */
            id: number;
            /** Image Id */
            image_id: number;
            /** Category Id */
            category_id: number;
            segmentation: components["schemas"]["CocoRle"];
            /** Area */
            area: number;
            /**
             * Bbox
             * @description x, y, width, height
             */
            bbox: [
                number,
                number,
                number,
                number
            ];
            /** Iscrowd */
            iscrowd: number;
        };
        /**
         * LesionAnswer
         * @description The lesion that was found, in pixels of the mask.
         */
        LesionAnswer: {
            /**
             * Found
             * @description whether any pixel is above the threshold
             */
            found: boolean;
            /**
             * Area
             * @description pixels
             * @example 157286
             */
            area: number;
            /**
             * Area Fraction
             * @description of the frame, 0 to 1
             * @example 0.2
             */
            area_fraction: number;
            /**
             * Bounding Box
             * @description x, y, width, height; null if nothing was found
             * @example [
             *       310,
             *       205,
             *       402,
             *       391
             *     ]
             */
            bounding_box: [
                number,
                number,
                number,
                number
            ] | null;
            /**
             * Centroid
             * @description x, y; null if nothing was found
             * @example [
             *       511.2,
             *       399.8
             *     ]
             */
            centroid: [
                number,
                number
            ] | null;
            /**
             * Mean Probability
             * @description of the pixels above the threshold, at the network's 128×128; null if there are none
             * @example 0.9312
             */
            mean_probability: number | null;
            /**
             * Max Probability
             * @description of all pixels, at the network's 128×128
             * @example 0.9987
             */
            max_probability: number;
            /** @description if the photo is DICOM and says how large its pixels are, and something was found; else absent */
            millimetres?: components["schemas"]["MillimetresAnswer"] | null;
        };
        /**
         * MillimetresAnswer
         * @description The lesion's measures on the skin, as far as the photo's own scale is right.
         */
        MillimetresAnswer: {
            /**
             * Pixel
             * @description a pixel of the photo, across and down; mm
             * @example [
             *       0.02,
             *       0.02
             *     ]
             */
            pixel: [
                number,
                number
            ];
            /**
             * Area
             * @description mm²
             * @example 62.9
             */
            area: number;
            /**
             * Perimeter
             * @description of all outlines, mm
             * @example 31.4
             */
            perimeter: number;
            /**
             * Major Axis
             * @description of the ellipse with the mask's second moments, mm
             * @example 8.05
             */
            major_axis: number;
            /**
             * Minor Axis
             * @description the same, across
             * @example 7.82
             */
            minor_axis: number;
            /**
             * Diameter
             * @description greatest distance of two points of the outline, mm
             * @example 8.2
             */
            diameter: number;
        };
        /**
         * QualityAnswer
         * @description How good the mask is likely to be.
         */
        QualityAnswer: {
            /**
             * Jaccard
             * @description the Jaccard with an annotator's mask that masks like this one have on average
             * @example 0.871
             */
            jaccard: number;
            /**
             * Grade
             * @description the same in words: `good` from 0.8, `fair` from 0.65, `poor` below
             * @example good
             * @enum {string}
             */
            grade: "good" | "fair" | "poor";
        };
        /**
         * FitnessAnswer
         * @description Whether the picture is one that the network was made for.
         */
        FitnessAnswer: {
            /**
             * Distance
             * @description of the picture from the dermoscopic photos that the network was trained on, as statistics of colours and detail tell it; 1 is the limit
             * @example 0.62
             */
            distance: number;
            /**
             * Unfit
             * @description whether it is above 1: then it is likely no dermoscopic photo, and the mask means nothing
             * @example false
             */
            unfit: boolean;
        };
        /**
         * Borders
         * @description Where the lesion's border may lie: the mask's own outline is between these two.
         */
        Borders: {
            /**
             * Share
             * @description part of an annotator's outline that lies between them, on average
             * @example 0.8
             */
            share: number;
            tight: components["schemas"]["Outline"];
            generous: components["schemas"]["Outline"];
        };
        /**
         * Outline
         * @description The outlines at one level of probability.
         */
        Outline: {
            /**
             * Threshold
             * @description the probability that they follow
             * @example 0.94
             */
            threshold: number;
            /**
             * Polygons
             * @description as in `mask`
             * @example [
             *       [
             *         [
             *           412.5,
             *           300.25
             *         ],
             *         [
             *           530.75,
             *           310.5
             *         ],
             *         [
             *           470,
             *           402.25
             *         ]
             *       ]
             *     ]
             */
            polygons: [
                number,
                number
            ][][][];
        };
        /**
         * FeaturesAnswer
         * @description Measurements of the lesion's shape and colours, and no diagnosis.
         *
         *     P is the perimeter, A the area, a and b are the long and the short axis.
         */
        FeaturesAnswer: {
            /**
             * Perimeter
             * @description of all outlines, pixels of the photo
             * @example 1571
             */
            perimeter: number;
            /**
             * Major Axis
             * @description of the ellipse with the mask's second moments, pixels
             * @example 402.5
             */
            major_axis: number;
            /**
             * Minor Axis
             * @description the same, across
             * @example 391
             */
            minor_axis: number;
            /**
             * Orientation
             * @description of the long axis: degrees from the x axis towards the y axis, which points down; above -90, up to 90
             * @example -31.4
             */
            orientation: number;
            /**
             * Eccentricity
             * @description √(1 - b²/a²), 0 for a circle
             * @example 0.24
             */
            eccentricity: number;
            /**
             * Asymmetry Major
             * @description share of the lesion whose mirror image at the long axis is no lesion
             * @example 0.05
             */
            asymmetry_major: number;
            /**
             * Asymmetry Minor
             * @description the same at the short axis
             * @example 0.07
             */
            asymmetry_minor: number;
            /**
             * Compactness
             * @description P²/(4πA), 1 for a circle
             * @example 1.25
             */
            compactness: number;
            /**
             * Irregularity
             * @description P²ab/(2π(a²+b²)A), about 1 for any ellipse
             * @example 1.2
             */
            irregularity: number;
            /**
             * Solidity
             * @description A over that of the convex hull
             * @example 0.97
             */
            solidity: number;
            colours: components["schemas"]["ColourShares"];
            /**
             * Colour Mean
             * @description mean red, green and blue inside, 0 to 255
             * @example [
             *       121.4,
             *       82.3,
             *       70.1
             *     ]
             */
            colour_mean: [
                number,
                number,
                number
            ];
            /**
             * Colour Deviation
             * @description their standard deviations
             * @example [
             *       24.1,
             *       20.6,
             *       19.2
             *     ]
             */
            colour_deviation: [
                number,
                number,
                number
            ];
        };
        /**
         * ColourShares
         * @description Shares of the lesion's pixels, 0 to 1, by the nearest of six colours.
         */
        ColourShares: {
            /** White */
            white: number;
            /** Red */
            red: number;
            /** Light Brown */
            light_brown: number;
            /** Dark Brown */
            dark_brown: number;
            /** Blue Grey */
            blue_grey: number;
            /** Black */
            black: number;
        };
    };
    responses: never;
    parameters: never;
    requestBodies: never;
    headers: never;
    pathItems: never;
}
export type $defs = Record<string, never>;
export type operations = Record<string, never>;
