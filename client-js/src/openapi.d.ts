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
        };
        /**
         * MaskFormat
         * @description How a JSON answer holds the mask.
         * @enum {string}
         */
        MaskFormat: "png" | "rle" | "polygons" | "probabilities";
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
